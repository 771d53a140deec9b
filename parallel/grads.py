"""Gradients: flat buffers, summed over all copies of a parameter, and the norm that counts each weight once.

Losses are already divided by the number of targets in the global batch, so gradients are summed and never
averaged. A stage's dense parameters have copies on all its data-parallel ranks and on the mirrors; its routed
experts on those with the same experts. Copies end up bit-equal, because an all-reduce gives all ranks the same sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualpipe.schedule import Schedule
from model.config import ModelConfig
from model.names import expert_parameters
from model.stage import ModelStage
from parallel.mesh import Mesh


@dataclass(frozen=True)
class GradBuffer:
    """The gradients of some parameters of a stage in one flat tensor, of which each `.grad` is a view.

    group   over which they are summed (None: there is one copy)
    owned   whether this rank counts them in the norm: exactly one of the copies does
    """

    flat: Tensor
    group: dist.ProcessGroup | None
    owned: bool


def mirrors(schedule: Schedule) -> list[list[int]]:
    """The PP ranks that hold the same stages, e.g. [[0, 3], [1, 2]] for DualPipe on 4 ranks, [[0], [1]] for 1F1B."""
    holders = {s: sorted({row[s] for row in schedule.placement}) for s in range(schedule.num_stages)}
    groups = {tuple(holders[s]) for rank in range(schedule.num_ranks) for s in schedule.stages_of(rank)}
    if sum(len(g) for g in groups) != schedule.num_ranks:
        raise ValueError(f"{schedule.name}: the ranks that share stages do not form separate groups: {sorted(groups)}")
    return [list(g) for g in sorted(groups)]


def embedding_holders(schedule: Schedule, config: ModelConfig) -> list[int]:
    """The PP ranks with a copy of the embedding: those of the first stage and, for MTP, of the last."""
    stages = (0, schedule.num_stages - 1) if config.mtp_depth else (0,)
    return sorted({row[stage] for row in schedule.placement for stage in stages})


def make_buffers(stages: Mapping[int, ModelStage], schedule: Schedule, mesh: Mesh) -> list[GradBuffer]:
    """Two buffers per stage, dense and experts, in the same order on all copies. Replaces all `.grad`.

    A parameter that two stages of this rank share is in the first one's buffer. An embedding that is also kept on
    another rank than its stage (MTP, see `embedding_holders`) has a buffer of its own, the first.
    """
    buffers = []
    seen: set[nn.Parameter] = set()
    if mesh.tied is not None:
        embedding = next((s.embedding.weight for s in stages.values() if hasattr(s, "embedding")), None)
        if embedding is not None:
            buffers.append(_buffer([embedding], mesh.tied, schedule.placement[0][0] == mesh.pp and mesh.dp == 0))
            seen.add(embedding)
    for number in sorted(stages):
        experts = expert_parameters(stages[number])
        named = {name: p for name, p in stages[number].named_parameters() if p not in seen}
        seen.update(named.values())
        first_copy = schedule.placement[0][number] == mesh.pp
        dense = [p for name, p in named.items() if name not in experts]
        buffers.append(_buffer(dense, mesh.dense, first_copy and mesh.dp == 0))
        if experts:
            routed = [p for name, p in named.items() if name in experts]
            buffers.append(_buffer(routed, mesh.experts, first_copy and mesh.dp < mesh.layout.ep))
    return buffers


def _buffer(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None, owned: bool) -> GradBuffer:
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
    for parameter, view in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = view.view_as(parameter)
    return GradBuffer(flat, group, owned)


def reduce_gradients(buffers: Sequence[GradBuffer]) -> None:
    """Sum every buffer over its copies; all sums are under way at once."""
    works = [dist.all_reduce(b.flat, group=b.group, async_op=True) for b in buffers if b.group is not None]
    for work in works:
        work.wait()


def gradient_norm(buffers: Sequence[GradBuffer], mesh: Mesh) -> float:
    """The norm of the whole model's gradient, after `reduce_gradients`; the same number on every rank."""
    device = buffers[0].flat.device
    square = torch.zeros((), dtype=torch.float64, device=device)
    for buffer in buffers:
        if buffer.owned:
            square += torch.linalg.vector_norm(buffer.flat, dtype=torch.float64).square()
    if mesh.layout.world > 1:
        dist.all_reduce(square)
    return float(square.sqrt())


def clip_gradients(buffers: Sequence[GradBuffer], norm: float, limit: float) -> None:
    """Scale all gradients so that their norm is at most `limit`; 0 means no limit."""
    if 0 < limit < norm:
        for buffer in buffers:
            buffer.flat.mul_(limit / norm)
