"""Router counts of the global batch, and the bias update that follows from them (report 2.1.2).

take_counts      sum what this rank's routers recorded over all copies of their layers: one collective
update_biases    ±γ on every router; copies see equal integers, so their biases stay equal
RouterTable      brings the counts of all layers of the model together on rank 0, for metrics
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe.schedule import Schedule
from model.balance import Counts, update_bias
from model.config import ModelConfig
from model.names import named_routers
from model.router import Router
from model.stage import ModelStage
from parallel.mesh import Mesh

Stages = Mapping[int, ModelStage]


def routers_of(stages: Stages) -> dict[str, Router]:
    """This rank's routers by the global name of their layer, in the order of the stages: the same on all copies."""
    return {name: router for number in sorted(stages) for name, router in named_routers(stages[number]).items()}


@torch.no_grad()
def take_counts(stages: Stages, mesh: Mesh) -> Counts | None:
    """The counts of this rank's routers since the last call, summed over all copies of their layers; clears them.

    One collective of integers for all layers, a row per router. None if there are no routers.
    """
    routers = list(routers_of(stages).values())
    if not routers:
        return None
    rows_LC = torch.stack([router.counts_C for router in routers])
    for router in routers:
        router.counts_C.zero_()
    if mesh.dense is not None:
        dist.all_reduce(rows_LC, group=mesh.dense)
    return Counts(rows_LC, routers[0].config.num_experts, routers[0].config.num_groups)


@torch.no_grad()
def update_biases(stages: Stages, counts: Counts | None, rate: float) -> None:
    """Move every router's bias by ±rate according to the global loads."""
    if counts is not None:
        for router, load_E in zip(routers_of(stages).values(), counts.load_LE, strict=True):
            update_bias(router.bias_E, load_E, rate)


@dataclass(frozen=True)
class RouterTable:
    """The routers of the whole model, and which rows of it this rank contributes: one copy of each does.

    names   of all layers with a router, in the order of the model
    rows    row of this table → position among this rank's routers
    """

    names: tuple[str, ...]
    rows: Mapping[int, int]
    experts: int
    groups: int

    @staticmethod
    def create(stages: Stages, schedule: Schedule, mesh: Mesh, config: ModelConfig) -> RouterTable:
        """Collective: every rank calls it once."""
        owned = {number for number in stages if schedule.placement[0][number] == mesh.pp and mesh.dp == 0}
        placed = [(number, name) for number in sorted(stages) for name in named_routers(stages[number])]
        mine = [(number, at, name) for at, (number, name) in enumerate(placed) if number in owned]
        found = [mine]
        if mesh.control is not None:
            found = [[] for _ in range(mesh.layout.world)]
            dist.all_gather_object(found, mine, group=mesh.control)
        names = [name for _, _, name in sorted(entry for entries in found for entry in entries)]
        rows = {names.index(name): at for _, at, name in mine}
        return RouterTable(tuple(names), rows, config.num_experts, config.num_groups)

    def gather(self, counts: Counts | None, stages: Stages, mesh: Mesh) -> tuple[Counts, Tensor]:
        """The counts and the biases [L, E] (FP64) of all layers, on rank 0; elsewhere this rank's part of them.

        One small collective between the hosts, for all layers.
        """
        biases = [router.bias_E for router in routers_of(stages).values()]
        width = Counts.width(self.experts, self.groups)
        table_LC = torch.zeros(len(self.names), width + self.experts, dtype=torch.float64)
        if counts is not None:
            host_LC = torch.cat((counts.rows_LC.double(), torch.stack(biases).double()), dim=1).cpu()
            for row, at in self.rows.items():
                table_LC[row] = host_LC[at]
        if mesh.control is not None and self.names:
            dist.reduce(table_LC, 0, group=mesh.control)
        return Counts(table_LC[:, :width].long(), self.experts, self.groups), table_LC[:, width:]
