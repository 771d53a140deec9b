"""What the copies of a stage must agree on besides weights: who they are, and how many tokens each expert got."""

from __future__ import annotations

from dualpipe.schedule import Schedule
from model.config import ModelConfig
from parallel.mesh import Layout


def mirrors(schedule: Schedule) -> list[list[int]]:
    """The PP ranks that hold the same stages, e.g. [[0, 3], [1, 2]] for DualPipe on 4 ranks, [[0], [1]] for 1F1B."""
    holders = {s: sorted({row[s] for row in schedule.placement}) for s in range(schedule.num_stages)}
    groups = {tuple(holders[s]) for rank in range(schedule.num_ranks) for s in schedule.stages_of(rank)}
    if sum(len(g) for g in groups) != schedule.num_ranks:
        raise ValueError(f"{schedule.name}: the ranks that share stages do not form separate groups: {sorted(groups)}")
    return [list(g) for g in sorted(groups)]


def same_stages(layout: Layout, schedule: Schedule) -> list[list[int]]:
    """For each rank, the ranks that hold the same stages, itself among them."""
    groups = {pp: layout.replicas(pps) for pps in mirrors(schedule) for pp in pps}
    return [groups[layout.pp_of(rank)] for rank in range(layout.world)]


def embedding_holders(schedule: Schedule, config: ModelConfig) -> list[int]:
    """The PP ranks with a copy of the embedding: those of the first stage and, for MTP, of the last."""
    stages = (0, schedule.num_stages - 1) if config.mtp_depth else (0,)
    return sorted({row[stage] for row in schedule.placement for stage in stages})
