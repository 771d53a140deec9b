"""One optimizer step, the same on every rank and for every layout.

count targets → pipeline (forward, backward) → sum gradients over copies → norm → clip → AdamW → router biases
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from model.batch import MicroBatch
from parallel.build import Replica
from parallel.grads import (
    clip_gradients,
    gradient_norm,
    reduce_gradients,
    take_expert_loads,
    update_router_biases,
)
from parallel.mesh import Mesh


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the targets of the global batch; load_LE: tokens per expert of this rank's MoE layers.

    `skipped` says that the gradient was not finite and the weights were left as they were. `seconds` is the host's
    time in each phase (pipeline, reduce, update).
    """

    loss: float
    grad_norm: float
    num_targets: int
    load_LE: Tensor
    skipped: bool
    seconds: dict[str, float]


class Stopwatch:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def train_step(
    replica: Replica,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    lr: float,
    clip: float,
    bias_rate: float,
) -> StepResult:
    """Train on this rank's micro-batches: all those of its pipeline."""
    mesh = replica.mesh
    num_targets = global_targets(micro_batches, mesh)
    for buffer in replica.buffers:
        buffer.flat.zero_()
    watch = Stopwatch()
    losses = replica.pipeline.step(scaled(micro_batches, num_targets))
    watch.lap("pipeline")
    reduce_gradients(replica.buffers)
    norm = gradient_norm(replica.buffers, mesh)
    watch.lap("reduce")
    skipped = not math.isfinite(norm)
    if not skipped:
        clip_gradients(replica.buffers, norm, clip)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        replica.precision.refresh()
    load_LE = take_expert_loads(replica.stages, mesh)
    if not skipped:
        update_router_biases(replica.stages, load_LE, bias_rate)
    watch.lap("update")
    return StepResult(global_loss(losses, mesh), norm, num_targets, load_LE, skipped, watch.seconds)


def evaluate(replica: Replica, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
    """Mean loss over the targets of these micro-batches of all data-parallel ranks, and how many targets those are."""
    num_targets = global_targets(micro_batches, replica.mesh)
    losses = replica.pipeline.evaluate(scaled(micro_batches, num_targets))
    take_expert_loads(replica.stages, replica.mesh)
    return global_loss(losses, replica.mesh), num_targets


def scaled(micro_batches: Sequence[MicroBatch], num_targets: int) -> list[MicroBatch]:
    return [replace(mb, loss_scale=1 / max(1, num_targets)) for mb in micro_batches]


def global_targets(micro_batches: Sequence[MicroBatch], mesh: Mesh) -> int:
    """Targets in the global batch: every pipeline counts its own, on each of its PP ranks alike."""
    count = torch.tensor(sum(mb.num_targets for mb in micro_batches))
    if mesh.control is not None:
        dist.all_reduce(count, group=mesh.control)
    return int(count) // mesh.layout.pp


def global_loss(losses: dict[int, Tensor], mesh: Mesh) -> float:
    """Each micro-batch's loss arises on one rank, already divided by the global number of targets."""
    total = torch.tensor(sum((float(losses[m]) for m in sorted(losses)), 0.0), dtype=torch.float64)
    if mesh.control is not None:
        dist.all_reduce(total, group=mesh.control)
    return float(total)
