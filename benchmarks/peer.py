"""The peer: transformers' DeepseekV3ForCausalLM with the weights of one of our models. Used by tests and benchmarks."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dualpipe.schedules import make_schedule
from model.config import ModelConfig
from model.hf import entries, to_hf_config
from model.names import named_tensors
from model.precisions import make_precision
from model.stage import ModelStage
from parallel.build import BuildOptions, Replica, build_replica
from parallel.mesh import Layout, Mesh

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def our_model(config: ModelConfig, precision: str, seed: int = 0, compiled: bool = False) -> Replica:
    """The whole model in this process, as one stage under 1F1B with one micro-batch, with its initial weights."""
    seam, dtype = make_precision(precision, compiled=compiled)
    mesh = Mesh(Layout(1, 1, 1), 0, None, None, None, None, None)
    options = BuildOptions(seed=seed, param_dtype=dtype, compile=compiled)
    schedule = make_schedule("one_f_one_b", 1, 1)
    return build_replica(config, schedule, mesh, seam, options)


def peer_model(
    config: ModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype, experts: str | None = None, **options: Any
) -> Any:
    """transformers' model for the same configuration, with our tensors (by global name) in `dtype`.

    experts   how it computes the experts ("eager", "grouped_mm" …); None leaves its default
    options   settings of its configuration, e.g. attn_implementation
    """
    settings = to_hf_config(config, "float32", int(config.rope_factor * config.rope_original_length))
    peer = DeepseekV3ForCausalLM(DeepseekV3Config(**settings, **options)).to(dtype)
    missing = peer.load_state_dict(peer_tensors(config, tensors), strict=False)
    if missing.missing_keys or missing.unexpected_keys:
        raise ValueError(f"the peer's tensors differ from ours: {missing}")
    if experts is not None:
        peer.set_experts_implementation(experts)
    return peer


def peer_tensors(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors (weights or gradients, by global name) under the names of transformers' modules.

    It keeps a layer's experts stacked, [experts, gate and up, D], unlike the files; MTP is not part of its model.
    """
    result: dict[str, Tensor] = {}
    stacked: dict[str, list[Tensor]] = {}
    for entry in entries(config):
        layer = re.match(r"model\.layers\.(\d+)\.", entry.name)
        if layer and int(layer[1]) >= config.num_layers:
            continue
        value = tensors[entry.ours].detach()[entry.rows]
        expert = _EXPERT.fullmatch(entry.name)
        if expert:
            name = "down_proj" if expert[3] == "down" else "gate_up_proj"
            stacked.setdefault(f"{expert[1]}.{name}", []).append(value)
        else:
            result[entry.name] = value
    for name, parts in stacked.items():
        rows = torch.cat(parts)
        result[name] = rows.view(config.num_experts, -1, rows.shape[1])
    return result


def weights_of(model: ModelStage) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor, _ in named_tensors(model)}


def gradients_of(model: ModelStage) -> dict[str, Tensor]:
    """The gradients by global name, zeros where there are none; of buffers: zeros."""
    result: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    slices: dict[str, Any] = {}
    for name, tensor, local in named_tensors(model):
        grad = parameters[local].grad if local in parameters else None
        if grad is None:
            result[name] = torch.zeros_like(tensor)
        elif grad.shape == tensor.shape:
            result[name] = grad
        else:
            result[name] = next(slices.setdefault(local, iter(grad)))
    return result
