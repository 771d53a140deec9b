"""What the layers of a model cost: measured (`python -m training.measure`), typed in, or counted.

A file of costs is JSON, times in any one unit; what a model does not have may be left out:

    {"dense": {"forward": 1.0, "inputs": 1.0, "weights": 1.0},
     "moe": {"forward": 1.4, "inputs": 1.6, "weights": 0.9, "overlap": 0.8},
     "embedding": {...}, "head": {...}, "mtp": {...}, "latency": 0.01, "transfer": 0.02}

`overlap` is the part of F + B that is left when the layer runs in an overlapped pair (default 1: it hides nothing);
`mtp` is one module of multi-token prediction with its use of the head.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dualpipe.split import ModelWork, Work
from model.config import ModelConfig
from training.config import Config

KINDS = ("dense", "moe", "embedding", "head", "mtp")
HIDDEN = 0.8  # without measurement: what an all-to-all between ranks leaves of F + B in a pair


def work_of(config: Config) -> ModelWork:
    """The work of the configured model. Raises ValueError if schedule.costs is not a file of costs."""
    if config.schedule.costs is None:
        kinds = counted(config.model, config.data.seq_len, config.parallel.ep)
        return assemble(config.model, kinds)
    latency, transfer, kinds = read_costs(Path(config.schedule.costs))
    return replace(assemble(config.model, kinds), latency=latency, transfer=transfer)


def assemble(model: ModelConfig, kinds: dict[str, Work]) -> ModelWork:
    """A model of layers of these kinds."""
    needed = {
        "dense": model.num_dense_layers > 0,
        "moe": model.num_moe_layers > 0,
        "mtp": model.mtp_depth > 0,
    }
    for kind, wanted in needed.items():
        if wanted and kind not in kinds:
            raise ValueError(f"schedule.costs has no {kind!r}, which the model has; measure again, or add it")
    layers = [kinds["dense"]] * model.num_dense_layers + [kinds["moe"]] * model.num_moe_layers
    last = sum([kinds["mtp"]] * model.mtp_depth, kinds.get("head", Work())) if model.mtp_depth else kinds.get("head")
    return ModelWork(tuple(layers), kinds.get("embedding", Work()), last or Work())


def counted(model: ModelConfig, seq_len: int, ep: int) -> dict[str, Work]:
    """Times in multiply-adds per token: of F, and as many again for I and for W, which attention's core has none of."""
    d, heads = model.hidden_size, model.num_heads
    query = model.head_dim + model.rope_dim
    queries = d * model.query_rank + model.query_rank * heads * query if model.query_rank else d * heads * query
    latents = d * (model.key_value_rank + model.rope_dim)
    products = queries + latents + model.key_value_rank * heads * (model.head_dim + model.value_dim)
    products += heads * model.value_dim * d
    core = heads * (query + model.value_dim) * seq_len / 2

    def layer(ffn: float, overlap: float) -> Work:
        return Work(products + ffn + core, products + ffn + 2 * core, products + ffn, overlap)

    width = (model.experts_per_token + model.num_shared_experts) * model.expert_ffn_size
    moe = layer(3 * d * width + d * model.num_experts, HIDDEN if ep > 1 else 1.0)
    head = Work(d * model.vocab_size, d * model.vocab_size, d * model.vocab_size)
    merge = Work(2 * d * d, 2 * d * d, 2 * d * d)
    dense = layer(3 * d * model.dense_ffn_size, 1.0)
    return {"dense": dense, "moe": moe, "embedding": Work(), "head": head, "mtp": merge + moe + head}


def read_costs(path: Path) -> tuple[float, float, dict[str, Work]]:
    """latency, transfer and the work by kind. Raises ValueError with one line for a file that is not one of costs."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"schedule.costs={path} cannot be read: {error}; write it with python -m training.measure"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f"schedule.costs={path} must hold an object with {', '.join(KINDS)}")
    kinds = {kind: _work(path, kind, data[kind]) for kind in KINDS if kind in data}
    latency, transfer = (_number(path, name, data.get(name, 0.0)) for name in ("latency", "transfer"))
    return latency, transfer, kinds


def _work(path: Path, kind: str, data: Any) -> Work:
    if not isinstance(data, dict) or set(data) - {"forward", "inputs", "weights", "overlap"}:
        raise ValueError(f"schedule.costs={path}: {kind} must have forward, inputs, weights and perhaps overlap")
    numbers = {name: _number(path, f"{kind}.{name}", data.get(name)) for name in ("forward", "inputs", "weights")}
    return Work(**numbers, overlap=_number(path, f"{kind}.overlap", data.get("overlap", 1.0)))


def _number(path: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"schedule.costs={path}: {name}={value!r} must be a number of at least 0")
    return float(value)
