"""One optimizer step, the same on every rank and for every layout.

count targets → pipeline (forward, backward) → sum gradients over copies → norm → clip → optimizer → router biases
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from model.balance import Counts
from model.batch import MicroBatch
from model.loss import LossConfig
from parallel.balance import take_counts, update_biases
from parallel.build import Replica
from parallel.mesh import Mesh
from parallel.update import Update


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the targets of the global batch; counts: what this rank's routers counted in it.
    mtp_losses: the same mean for each depth of multi-token prediction; z_loss: mean squared log-normaliser.

    `skipped` says that the gradient was not finite and the weights were left as they were. `seconds` is the host's
    time in each phase (pipeline, reduce, update).
    """

    loss: float
    grad_norm: float
    num_targets: int
    counts: Counts | None
    skipped: bool
    seconds: dict[str, float]
    mtp_losses: tuple[float, ...] = ()
    z_loss: float | None = None


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
    update: Update,
    micro_batches: Sequence[MicroBatch],
    lr: float,
    clip: float,
    bias_rate: float,
    loss_config: LossConfig | None = None,
    norm_limit: float = math.inf,
) -> StepResult:
    """Train on this rank's micro-batches: all those of its pipeline.

    A loss or gradient norm that is not finite, or a norm above `norm_limit`, leaves the weights as they are.
    """
    mesh = replica.mesh
    scales = loss_scales(micro_batches, replica.config.mtp_depth, loss_config or LossConfig(), mesh)
    update.zero_gradients()
    watch = Stopwatch()
    batch = [replace(mb, **scales.fields) for mb in micro_batches]
    with record_function("pipeline"):  # these ranges are for profile=on
        losses = replica.pipeline.step(batch, update.stage_done)
    watch.lap("pipeline")
    with record_function("reduce"):
        update.finish_reduction()
    norm = update.gradient_norm()
    loss, *others = global_terms(losses, scales, mesh)
    watch.lap("reduce")
    skipped = not (math.isfinite(loss) and math.isfinite(norm) and norm <= norm_limit)
    if not skipped:
        with record_function("update"):
            update.step(lr, clip / norm if 0 < clip < norm else 1.0)
        replica.precision.refresh()
    counts = take_counts(replica.stages, mesh)
    if not skipped:
        update_biases(replica.stages, counts, bias_rate)
    watch.lap("update")
    mtp_losses, z_loss = tuple(others[: len(scales.mtp)]), others[-1] if scales.z else None
    return StepResult(loss, norm, scales.num_targets, counts, skipped, watch.seconds, mtp_losses, z_loss)


@dataclass(frozen=True)
class EvalResult:
    """Mean loss over these targets of all data-parallel ranks; counts: what this rank's routers counted."""

    loss: float
    num_targets: int
    counts: Counts | None


def evaluate(replica: Replica, micro_batches: Sequence[MicroBatch]) -> EvalResult:
    """Forward only, on this rank's micro-batches, of the main model alone: multi-token prediction is left out."""
    scales = loss_scales(micro_batches, 0, LossConfig(), replica.mesh)
    losses = replica.pipeline.evaluate([replace(mb, **scales.fields) for mb in micro_batches])
    counts = take_counts(replica.stages, replica.mesh)
    return EvalResult(global_terms(losses, scales, replica.mesh)[0], scales.num_targets, counts)


@dataclass(frozen=True)
class LossScales:
    """What one target counts in the loss, by term; `unscaled` has each term's factor on top of the mean.

    sequence   what one sequence counts in the balance losses
    """

    num_targets: int
    sequence: float
    main: float
    mtp: tuple[float, ...]
    z: float
    unscaled: tuple[float, ...]

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `MicroBatch` that say so."""
        return {
            "loss_scale": self.main,
            "mtp_scales": self.mtp,
            "z_scale": self.z,
            "sequence_scale": self.sequence,
        }


def loss_scales(micro_batches: Sequence[MicroBatch], depth: int, config: LossConfig, mesh: Mesh) -> LossScales:
    """One over the targets of the global batch, for each depth its own; times the weight of the term (report 2.2)."""
    depth = depth if config.mtp_weight else 0
    sequences, *counts = global_sizes(micro_batches, depth, mesh)
    mean, *mtp_means = (1 / max(1, count) for count in counts)
    weight = config.mtp_weight / max(1, depth)
    unscaled = (1.0, *[weight] * depth, *[config.z_weight] * bool(config.z_weight))
    mtp = tuple(weight * m for m in mtp_means)
    return LossScales(counts[0], 1 / sequences, mean, mtp, config.z_weight * mean, unscaled)


def global_sizes(micro_batches: Sequence[MicroBatch], depth: int, mesh: Mesh) -> list[int]:
    """Sequences in the global batch, and targets by depth: every pipeline counts its own, on each PP rank alike."""
    counts = torch.tensor([[len(mb.tokens_BS), *mb.target_counts(depth)] for mb in micro_batches]).sum(0)
    if mesh.control is not None:
        dist.all_reduce(counts, group=mesh.control)
    return (counts // mesh.layout.pp).tolist()


def global_terms(losses: dict[int, Tensor], scales: LossScales, mesh: Mesh) -> list[float]:
    """The terms of the loss as means (see `ModelStage.segments`). Each micro-batch's arise on one rank, scaled."""
    total = torch.zeros(len(scales.unscaled), dtype=torch.float64)
    for number in sorted(losses):
        total += losses[number].double().cpu()
    if mesh.control is not None:
        dist.all_reduce(total, group=mesh.control)
    return (total / torch.tensor(scales.unscaled, dtype=torch.float64)).tolist()
