"""Which rows travel where: the arithmetic of expert dispatch, without any communication.

Tokens take up to two hops. The first crosses from a rank to the same place in every node that holds one of the
token's experts, the second goes on to the ranks of that node that do. With one rank per node the first hop is all
there is, with one node the second; a single rank needs none.

One table per layer and micro-batch tells everybody all sizes. Rank s sends rank d = (node b, place j) one row of it:

    [tokens from s that node b needs | tokens from s that each rank of node b needs | rows for each expert of d]

Shapes: T local tokens, K experts per token, P ranks of the group (nodes × local), E all experts, M received rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a rank stands: position p is place p % local of node p // local, and holds `share` experts from p·share."""

    position: int
    nodes: int
    local: int
    share: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.local

    @property
    def node(self) -> int:
        return self.position // self.local

    @property
    def seat(self) -> int:
        return self.position % self.local


def targets(experts_MK: Tensor, first: int, share: int, count: int) -> Tensor:
    """bool [count, M]: does target c hold one of the row's experts? It holds `share` of them from first + c·share."""
    owner_MK = torch.div(experts_MK.long() - first, share, rounding_mode="floor")
    owner_MK = owner_MK.masked_fill((owner_MK < 0) | (owner_MK >= count), count)
    wanted = torch.zeros(len(experts_MK), count + 1, dtype=torch.bool, device=experts_MK.device)
    return wanted.scatter_(1, owner_MK, True)[:, :count].t()


def count_table(experts_TK: Tensor, place: Place) -> Tensor:
    """int64 [P, 1 + local + share]: what this rank tells every rank of the group."""
    ranks_PT = targets(experts_TK, 0, place.share, place.ranks)
    nodes_N = ranks_PT.view(place.nodes, place.local, -1).any(1).sum(1)
    per_rank_NL = ranks_PT.sum(1).view(place.nodes, place.local)
    chosen = experts_TK.flatten()
    per_expert_E = torch.zeros(place.ranks * place.share, dtype=torch.int64, device=experts_TK.device)
    per_expert_E.scatter_add_(0, chosen, torch.ones_like(chosen))
    parts = (
        nodes_N.repeat_interleave(place.local).unsqueeze(1),
        per_rank_NL.repeat_interleave(place.local, dim=0),
        per_expert_E.view(place.ranks, place.share),
    )
    return torch.cat(parts, 1)


@dataclass(frozen=True)
class Sizes:
    """How many rows each hop sends to and receives from each of its ranks, and how many rows each local expert gets."""

    sent: tuple[list[int], list[int]]
    received: tuple[list[int], list[int]]
    per_expert: list[int]

    @staticmethod
    def read(sent: Sequence[Sequence[int]], received: Sequence[Sequence[int]], place: Place) -> Sizes:
        """From the table that this rank sent and the one that it received (row d to, row s from, that position)."""
        local, nodes = place.local, range(place.nodes)
        seats = range(local)
        across = [sent[n * local][0] for n in nodes], [received[n * local + place.seat][0] for n in nodes]
        inside = (
            [sum(received[n * local + place.seat][1 + j] for n in nodes) for j in seats],
            [sum(received[n * local + j][1 + place.seat] for n in nodes) for j in seats],
        )
        per_expert = [sum(row[1 + local + e] for row in received) for e in range(place.share)]
        return Sizes((across[0], inside[0]), (across[1], inside[1]), per_expert)


def rows_for(wanted_CM: Tensor, count: int) -> Tensor:
    """The rows that travel, by target and then by row: `count` indices. The host need not wait for the device."""
    return torch.nonzero_static(wanted_CM, size=count)[:, 1]


def sort_by_expert(experts_MK: Tensor, place: Place, rows: int) -> tuple[Tensor, Tensor]:
    """One row per (received row, local expert), sorted by expert: its received row, and the slot of that expert."""
    local_MK = experts_MK - place.position * place.share
    local_MK = local_MK.masked_fill((local_MK < 0) | (local_MK >= place.share), place.share)
    order_R = local_MK.flatten().argsort(stable=True)[:rows]
    slots = experts_MK.shape[1]
    return torch.div(order_R, slots, rounding_mode="floor"), order_R % slots
