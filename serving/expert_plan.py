"""When experts get new places: loads measured while serving, and plans from them (report 3.4.1).

Everything here is a pure function, or a sum, of integers that all ranks have in common, so all ranks come to the same
plan by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parallel.copies import Slots
from parallel.placement import Plan, place_experts
from parallel.relocation import closest_plan
from serving.swaps import arrange

POLICIES = ("global", "hierarchical")


@dataclass(frozen=True)
class ExpertSettings:
    """redundant   slots beyond one per expert, in all ranks together; rounded up so that ranks have equally many
    placement_every   steps from one measurement and plan to the next; 0 = the first placement stays
    policy   global: any expert anywhere (decode). hierarchical: expert groups stay within a node (prefill)
    ranks_per_node   for the hierarchical policy
    memory   of the moving average of loads: what is left of it at the next measurement
    slack   how much heavier than planned the heaviest rank may be, if that saves moves
    active   dynamic redundancy: most experts of a rank that are used for a layer of a step; 0 = all copies
    overlap_rows   steps in which some rank has at least so many rows are two micro-batches (micro_batches.py);
                   0 = none. Products of other heights round otherwise, so which steps these are shows in last digits
    """

    redundant: int = 0
    placement_every: int = 0
    policy: str = "global"
    ranks_per_node: int = 8
    memory: float = 0.5
    slack: float = 0.02
    active: int = 0
    overlap_rows: int = 0

    def check(self, experts: int, ranks: int) -> None:
        """Raise ValueError for settings that cannot be, saying which."""
        for name in ("redundant", "placement_every", "active", "overlap_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r} is unknown; choose one of {', '.join(POLICIES)}")
        if self.ranks_per_node < 1 or not 0 <= self.memory < 1 or self.slack < 0:
            raise ValueError(
                f"ranks_per_node={self.ranks_per_node} must be at least 1, memory={self.memory} in [0, 1), "
                f"slack={self.slack} not negative"
            )
        if self.active and self.active * ranks < experts:
            raise ValueError(
                f"active={self.active} experts on each of {ranks} ranks are fewer than the {experts} experts; "
                f"need at least {-(-experts // ranks)}"
            )

    def slots(self, experts: int, ranks: int) -> int:
        """On each rank."""
        return -(-(experts + self.redundant) // ranks)

    def active_on(self, experts: int, ranks: int) -> int:
        """`active`, or what it takes when ranks have been lost."""
        return max(self.active, -(-experts // ranks)) if self.active else 0

    def nodes(self, ranks: int) -> int:
        """Into how many nodes the plan divides the ranks."""
        if self.policy == "global" or ranks % self.ranks_per_node:
            return 1
        return ranks // self.ranks_per_node


class Loads:
    """The moving average of the tokens of each expert, by layer: average [L, E] (FP64), zeros before the first."""

    def __init__(self, layers: int, experts: int, memory: float) -> None:
        self.average, self.memory = np.zeros((layers, experts)), memory

    def add(self, counts_LE: Tensor) -> None:
        """One more measurement, of all ranks; a layer without tokens keeps its average."""
        counts = counts_LE.numpy().astype(np.float64)
        seen = counts.any(1, keepdims=True)
        started = self.average.any(1, keepdims=True)
        mixed = np.where(started, self.memory * self.average + (1 - self.memory) * counts, counts)
        self.average = np.where(seen, mixed, self.average)


def first_slots(loads: np.ndarray, held: Sequence[Sequence[int]], groups: int, settings: ExpertSettings) -> Slots:
    """A placement for ranks that hold some experts already, or none; few are missing in it.

    With nothing held, experts go to the ranks in order, as in training, until loads are known.
    """
    nodes, per_rank = settings.nodes(len(held)), settings.slots(len(loads), len(held))
    if nodes > 1 and any(held):  # groups must stay whole within nodes
        padded = tuple(tuple((*have, *[-1] * per_rank)[:per_rank]) for have in held)
        return arrange(padded, _place(loads, groups, len(held), settings).ranks)
    filled = _filled(loads, [list(dict.fromkeys(have))[:per_rank] for have in held], per_rank, nodes)
    return next_slots(loads, filled, groups, settings) if loads.any() else filled


def _filled(loads: np.ndarray, held: list[list[int]], per_rank: int, nodes: int) -> Slots:
    """Slots with what is there, then the missing experts, then copies of the busiest that are within the node."""
    ranks, experts, nothing = len(held), len(loads), not any(held)
    copies = np.bincount([e for rank in held for e in rank], minlength=experts)
    missing = np.flatnonzero(copies == 0).tolist()
    while sum(map(len, held)) + len(missing) > ranks * per_rank:
        rank = max((rank for rank in held if any(copies[e] > 1 for e in rank)), key=len)
        rank.remove(gone := min((e for e in rank if copies[e] > 1), key=lambda e: loads[e]))
        copies[gone] -= 1
    for expert in missing:
        at = expert * ranks // experts if nothing else min(range(ranks), key=lambda r: len(held[r]))
        held[at].append(expert)
        copies[expert] += 1
    local = ranks // nodes
    for _ in range(per_rank):
        for number, rank in enumerate(held):
            if len(rank) < per_rank:
                first = number // local * local
                near = sorted({e for other in held[first : first + local] for e in other})
                new = [e for e in near if e not in rank] or near
                rank.append(max(new, key=lambda e: ((loads[e] or 1.0) / copies[e], -e)))
                copies[rank[-1]] += 1
    return tuple(tuple(rank) for rank in held)


def next_slots(loads: np.ndarray, current: Slots, groups: int, settings: ExpertSettings) -> Slots:
    """A better placement under these loads, near the present one, or that itself if it is good enough."""
    now = Plan(tuple(tuple(sorted(rank)) for rank in current))
    nodes = settings.nodes(len(current))
    wanted = _place(loads, groups, len(current), settings)
    if now.imbalance(loads) <= wanted.imbalance(loads) * (1 + settings.slack):
        return current
    plan = closest_plan(now, wanted, loads, nodes if groups % nodes == 0 else 1, settings.slack)
    return arrange(current, plan.ranks)


def _place(loads: np.ndarray, groups: int, ranks: int, settings: ExpertSettings) -> Plan:
    slots, nodes = settings.slots(len(loads), ranks) * ranks, settings.nodes(ranks)
    if not loads.any():
        loads = np.ones_like(loads)  # nothing is known yet, so redundant copies are of different experts
    if nodes > 1:
        return place_experts(loads, slots, ranks, nodes, groups)
    return place_experts(loads, slots, ranks)


def imbalance(rows: Sequence[float] | Tensor) -> float:
    """Maximum over mean of what ranks computed; 1 if that is nothing."""
    values = torch.as_tensor(rows, dtype=torch.float64)
    return float(values.max() / values.mean()) if values.any() else 1.0
