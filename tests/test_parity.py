"""Our model against an implementation that is not ours: transformers' DeepseekV3ForCausalLM, logits and gradients.

transformers computes norms, the router, rotary angles and the softmax in FP32 whatever the dtype of the model. For
the FP64 comparison its module sees a torch whose `float32` is FP64; nothing else of it is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers.modeling_rope_utils as rope_module
import transformers.models.deepseek_v3.modeling_deepseek_v3 as peer_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.peer import gradients_of, our_model, peer_model, peer_tensors, weights_of
from model.batch import MicroBatch
from model.config import ModelConfig
from model.hf import from_hf_config, to_hf_config
from model.names import named_routers

TOLERANCE = {"fp64": 1e-10, "fp32": 2e-5}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


class _Wide:
    """torch, except that its float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def really_in(precision: str) -> Iterator[None]:
    if precision == "fp64":
        with patch.object(peer_module, "torch", _Wide()), patch.object(rope_module, "torch", _Wide()):
            yield
    else:
        yield


@st.composite
def configurations(draw: st.DrawFn) -> ModelConfig:
    num_groups = draw(st.sampled_from((1, 2, 4)))
    per_group = draw(st.sampled_from((2, 3, 4)))
    groups_per_token = draw(st.integers(1, num_groups))
    layers = draw(st.integers(1, 3))
    yarn = draw(st.booleans())
    return ModelConfig(
        vocab_size=draw(st.integers(5, 40)),
        num_layers=layers,
        num_dense_layers=draw(st.integers(0, layers)),
        hidden_size=draw(st.sampled_from((8, 12, 20))),
        dense_ffn_size=draw(st.sampled_from((8, 22))),
        num_heads=draw(st.integers(1, 4)),
        query_rank=draw(st.sampled_from((0, 6, 10))),
        key_value_rank=draw(st.sampled_from((4, 10))),
        head_dim=draw(st.sampled_from((4, 6))),
        rope_dim=draw(st.sampled_from((2, 4, 8))),
        value_dim=draw(st.sampled_from((4, 8, 14))),
        rope_base=draw(st.sampled_from((100.0, 10_000.0))),
        num_experts=num_groups * per_group,
        experts_per_token=draw(st.integers(1, groups_per_token * per_group)),
        num_shared_experts=draw(st.integers(1, 2)),
        expert_ffn_size=draw(st.sampled_from((6, 10))),
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        route_scale=draw(st.sampled_from((1.0, 2.5))),
        init_std=0.2,
        rope_factor=draw(st.sampled_from((4.0, 40.0))) if yarn else 1.0,
        rope_original_length=draw(st.sampled_from((64, 256, 4096))),
        rope_beta_fast=draw(st.sampled_from((8.0, 32.0))),
        rope_mscale=draw(st.sampled_from((0.7, 1.0))),
        rope_mscale_all_dim=draw(st.sampled_from((0.5, 1.0))),
    )


def random_batch(config: ModelConfig, seed: int) -> MicroBatch:
    """Two rows of one document each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (2, 14), generator=generator)
    positions = torch.arange(13).expand(2, 13)
    zeros = torch.zeros_like(positions)
    return MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), zeros, positions, 1 / 26)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm().detach() / theirs.norm().detach().clamp(min=1e-30))


def compare(config: ModelConfig, seed: int, precision: str) -> None:
    replica = our_model(config, precision, seed)
    model = replica.stages[0]
    generator = torch.Generator().manual_seed(seed)
    for router in named_routers(model).values():
        router.bias_E.copy_(0.3 * torch.randn(config.num_experts, generator=generator))
    mb = random_batch(config, seed)

    def peer_in(own: str) -> Any:
        with really_in(own):
            peer = peer_model(config, weights_of(model), DTYPES[own], "eager", attn_implementation="eager")
            return peer, peer(input_ids=mb.tokens_BS, position_ids=mb.positions_BS).logits

    _, logits = peer_in(precision)
    assert relative(model.logits(mb), logits) <= TOLERANCE[precision]
    # Gradients are compared with the peer's in FP64: its own rounding in FP32 may take most of the tolerance.
    peer, logits = peer_in("fp64")
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), mb.targets_BS.flatten())
    with really_in("fp64"):
        loss.backward()
    assert relative(model.logits(mb), logits) <= TOLERANCE[precision]
    our_loss = replica.pipeline.step([mb])[0].sum().item()
    assert abs(our_loss - loss.item()) <= TOLERANCE[precision] * loss.item()
    ours = peer_tensors(config, gradients_of(model))
    whole = float(torch.stack([p.grad.square().sum() for p in peer.parameters() if p.grad is not None]).sum().sqrt())
    for name, parameter in peer.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        error = float((ours[name] - grad).norm())
        # A gradient that is nearly zero as a whole is all cancellation: it is held to the norm of the whole gradient.
        assert error <= TOLERANCE[precision] * max(float(grad.norm()), 1e-2 * whole), f"{name}: {error}"


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@given(configurations(), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_logits_and_gradients_equal_those_of_transformers(precision: str, config: ModelConfig, seed: int) -> None:
    compare(config, seed, precision)


@given(configurations())
@settings(max_examples=50, deadline=None)
def test_a_configuration_survives_the_public_format(config: ModelConfig) -> None:
    there = to_hf_config(config, "bfloat16", 4096)
    if config.rope_factor == 1:  # the settings of a YaRN that is off are not written
        for name in ("rope_original_length", "rope_beta_fast", "rope_mscale", "rope_mscale_all_dim"):
            setattr(config, name, getattr(ModelConfig(), name))
    assert from_hf_config(there) == config
