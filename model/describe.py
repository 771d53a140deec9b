"""What a model costs, from its configuration alone: parameters, FLOPs per token, memory per rank. Nothing is allocated.

The parameters are counted from the table of the public checkpoint's tensors (`model/hf.py`), which is also what an
export writes. FLOPs count two per multiplication with a weight, and causal attention as what it needs: on average
half of the positions. Training takes three times the forward; recomputation is not counted as useful work.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from model.activations import stage_activations
from model.config import ModelConfig, split_layers
from model.hf import Entry, entries

BYTES_BF16, BYTES_FP32, BYTES_ADAM = 2, 4, 8  # two FP32 moments


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; `main` is everything but MTP, `active` what one token uses of it."""

    embedding: int
    head: int
    attention: int
    dense: int  # dense MLPs, routers, norms
    shared: int
    routed: int
    active_routed: int
    mtp: int
    mtp_active: int

    @property
    def main(self) -> int:
        return self.embedding + self.head + self.attention + self.dense + self.shared + self.routed

    @property
    def active(self) -> int:
        return self.main - self.routed + self.active_routed


def count_parameters(config: ModelConfig) -> Parameters:
    sums = dict.fromkeys(("embedding", "head", "attention", "dense", "shared", "routed", "mtp", "mtp_routed"), 0)
    for entry in entries(config):
        if not entry.is_copy and not entry.ours.endswith("bias_E"):
            size = math.prod(entry.shape)
            sums[_kind(entry)] += size
            if entry.ours.startswith("mtp.") and ".experts." in entry.ours:
                sums["mtp_routed"] += size
    share = config.experts_per_token / config.num_experts
    mtp_routed = sums.pop("mtp_routed")
    mtp_active = sums["mtp"] - mtp_routed + round(mtp_routed * share)
    return Parameters(**sums, active_routed=round(sums["routed"] * share), mtp_active=mtp_active)


def _kind(entry: Entry) -> str:
    first = entry.ours.split(".")[0]
    if first in ("embedding", "head", "mtp"):
        return first
    for part, kind in ((".experts.", "routed"), (".shared.", "shared"), (".attention.", "attention")):
        if part in entry.ours:
            return kind
    return "dense"


def training_flops(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward, per token of the main model, in sequences of one document."""
    counts = count_parameters(config)
    weights = counts.active - counts.embedding  # looking up a row multiplies nothing
    return 6.0 * weights + 3.0 * attention_flops(config, seq_len)


def attention_flops(config: ModelConfig, seq_len: int) -> float:
    """The forward of the attention core, per token, over all layers of the main model."""
    per_key = 2 * config.num_heads * (config.head_dim + config.rope_dim + config.value_dim)
    return config.num_layers * per_key * (seq_len + 1) / 2


def cache_bytes(config: ModelConfig) -> int:
    """The key-value cache of one token in BF16: the latent and the rotary key, for every layer."""
    return config.num_layers * (config.key_value_rank + config.rope_dim) * BYTES_BF16


@dataclass(frozen=True)
class Layout:
    """PP × DP ranks, EP inside DP; `mirrored` as under DualPipe: rank r holds the stages r and PP−1−r."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    mirrored: bool = True
    zero: bool = True  # optimizer state sharded over the copies of a parameter

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError, naming the value to change, for sizes that do not fit."""
        for name in ("pp", "dp", "ep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.dp % self.ep or config.num_experts % self.ep:
            raise ValueError(f"ep={self.ep} must divide dp={self.dp} and the {config.num_experts} experts")
        split_layers(config, self.pp)


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the rank that holds most: `rank` of the pipeline."""

    rank: int
    parameters: int
    weights: float  # FP32 masters and BF16 copies
    gradients: float
    optimizer: float
    activations: float
    micro_batches: int  # whose activations are kept at once

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def rank_memory(config: ModelConfig, layout: Layout, tokens: int) -> RankMemory:
    """FP32 master weights and gradients, BF16 copies, Adam's moments in FP32, BF16 activations at the pipeline's peak.

    tokens   of a micro-batch. Stage s of PP keeps those of PP − s micro-batches, as under 1F1B; mirrored, a rank does
             so for both of its stages (DualPipe's PP + 1 in all). What lives within one backward comes on top.

    Raises ValueError for a bad layout.
    """
    layout.check(config)
    stages, layers = _stage_sizes(config, layout), split_layers(config, layout.pp)
    kept = [stage_activations(config, held, s == layout.pp - 1, tokens) for s, held in enumerate(layers)]
    copies = layout.dp * (2 if layout.mirrored and layout.pp > 1 else 1)
    most = None
    for rank in range(layout.pp):
        held = {rank, layout.pp - 1 - rank} if layout.mirrored else {rank}
        dense, routed = (sum(stages[s][i] for s in held) for i in (0, 1))
        routed //= layout.ep
        number = dense + routed
        shards = (copies, copies / layout.ep) if layout.zero else (1, 1)
        optimizer = BYTES_ADAM * (dense / shards[0] + routed / shards[1])
        micro_batches = [layout.pp - stage for stage in held]
        activations = sum(kept[stage] * (layout.pp - stage) for stage in held)
        weights, gradients = (BYTES_FP32 + BYTES_BF16) * number, BYTES_FP32 * number
        memory = RankMemory(rank, number, weights, gradients, optimizer, activations, sum(micro_batches))
        if most is None or memory.total > most.total:
            most = memory
    assert most is not None
    return most


def _stage_sizes(config: ModelConfig, layout: Layout) -> list[tuple[int, int]]:
    """(dense, routed) parameters of each stage."""
    layers = split_layers(config, layout.pp)
    sizes = [[0, 0] for _ in layers]
    for entry in entries(config):
        if entry.is_copy:
            continue
        match = re.match(r"layers\.(\d+)\.", entry.ours)
        if match:
            stage = next(s for s, held in enumerate(layers) if int(match[1]) in held)
        else:
            stage = 0 if entry.ours.startswith("embedding") else layout.pp - 1
        sizes[stage][".experts." in entry.ours] += math.prod(entry.shape)
    return [(dense, routed) for dense, routed in sizes]
