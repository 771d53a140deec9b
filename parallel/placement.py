"""Which rank holds which experts, so that all ranks have equal work (report 3.4.1)? A pure function of the loads.

A plan gives each rank the same number of *slots*, and each slot an expert. With more slots than experts the most
loaded experts get redundant copies, which share their expert's tokens evenly.

    global          any expert anywhere
    hierarchical    expert groups stay whole within a node, so that node-limited routing keeps its promise: groups to
                    nodes, then copies within each node, then slots to ranks

Each step is greedy and then mended. Copies go to the expert with the most load per copy. Packing takes items from
heavy to light, always to the lightest bin with room, and then swaps items of the heaviest bin with others as long as
that helps. At last redundant copies change their expert as long as that helps.

Loads are of one layer: [experts] tokens; a plan holds for that layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

Loads = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Plan:
    """ranks[r]: the experts of rank r, ascending; every expert is on at least one rank.

    A rank may hold two copies of one expert: as every rank has the same number of slots, that can balance best.
    """

    ranks: tuple[tuple[int, ...], ...]

    def copies(self) -> np.ndarray:
        """How many slots hold each expert."""
        return np.bincount([expert for rank in self.ranks for expert in rank])

    def rank_loads(self, loads: Loads) -> np.ndarray:
        """The load of each rank when the copies of an expert share its load evenly."""
        per_copy = np.asarray(loads, dtype=np.float64) / self.copies()
        return np.array([per_copy[list(rank)].sum() for rank in self.ranks])

    def imbalance(self, loads: Loads) -> float:
        """Maximum over mean load per rank; 1 is perfect."""
        rank_loads = self.rank_loads(loads)
        return float(rank_loads.max() / rank_loads.mean()) if rank_loads.any() else 1.0


def place_experts(loads: Loads, slots: int, ranks: int, nodes: int = 1, groups: int = 1) -> Plan:
    """The hierarchical plan if the groups can be divided among the nodes, else the global one.

    slots    in all ranks together, at least one per expert; those beyond the number of experts hold copies
    groups   of neighbouring experts, as in node-limited routing
    Raises ValueError if the numbers do not fit, or for loads that are negative or not finite.
    """
    weights = np.asarray(loads, dtype=np.float64)
    experts = len(weights)
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("expert loads must be finite and not negative")
    if slots % ranks or slots < experts:
        raise ValueError(
            f"{slots} slots for {experts} experts on {ranks} ranks: need a multiple of the ranks, and a slot per expert"
        )
    if groups % nodes:
        return Plan(_place(weights, slots, ranks))
    if experts % groups or ranks % nodes or slots % nodes:
        raise ValueError(
            f"{experts} experts in {groups} groups, {slots} slots on {ranks} ranks of {nodes} nodes: groups must "
            f"divide the experts, and nodes the ranks and the slots"
        )
    return _place_hierarchically(weights, slots, ranks, nodes, groups)


def _place_hierarchically(weights: np.ndarray, slots: int, ranks: int, nodes: int, groups: int) -> Plan:
    size = len(weights) // groups
    per_group = weights.reshape(groups, size).sum(1)
    greedy = _pack(per_group, nodes)
    plans = []
    for packing in (greedy, swap_items(per_group, greedy)):  # evener nodes mostly, not always, mean evener ranks
        placed: list[tuple[int, ...]] = []
        for node in packing:
            members = [group * size + i for group in sorted(node) for i in range(size)]
            local = _place(weights[members], slots // nodes, ranks // nodes)
            placed += [tuple(members[i] for i in rank) for rank in local]
        plans.append(Plan(tuple(placed)))
    return min(plans, key=lambda plan: plan.imbalance(weights))


def _place(weights: np.ndarray, slots: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    """The global policy: the experts of each rank."""
    copies = _replicate(weights, slots)
    bins, heaviest = _pack_copies(weights, copies, ranks)
    while (better := _move_a_copy(weights, copies, bins, heaviest)) is not None:
        copies, bins, heaviest = better
    return tuple(tuple(sorted(rank)) for rank in bins)


def _replicate(weights: np.ndarray, slots: int) -> np.ndarray:
    """Copies of each expert: each further one goes where the load per copy is largest."""
    copies = np.ones(len(weights), dtype=np.int64)
    for _ in range(slots - len(weights)):
        copies[np.argmax(weights / copies)] += 1
    return copies


def _pack_copies(weights: np.ndarray, copies: np.ndarray, ranks: int) -> tuple[list[list[int]], float]:
    """Copies to ranks, and the heaviest rank's load."""
    experts = np.repeat(np.arange(len(weights)), copies)
    per_copy = (weights / copies)[experts]
    bins = swap_items(per_copy, _pack(per_copy, ranks))
    return [[int(experts[i]) for i in items] for items in bins], max(float(per_copy[items].sum()) for items in bins)


def _move_a_copy(
    weights: np.ndarray, copies: np.ndarray, bins: list[list[int]], heaviest: float
) -> tuple[np.ndarray, list[list[int]], float] | None:
    """Take a copy from one expert and give it to one of the heaviest rank; None if no such step lowers the maximum."""
    per_copy = weights / copies
    hot = max(bins, key=lambda rank: float(per_copy[rank].sum()))
    donors = np.flatnonzero(copies > 1)
    donors = donors[np.argsort(weights[donors] / (copies[donors] - 1), kind="stable")][:_DONORS]
    for expert in sorted(set(hot), key=lambda e: -per_copy[e]):
        for donor in donors:
            changed = copies.copy()
            changed[donor] -= 1
            changed[expert] += 1
            packed, load = _pack_copies(weights, changed, len(bins))
            if load < heaviest * (1 - _WORTH):
                return changed, packed, load
    return None


_DONORS = 4  # experts that are asked to give up a copy: those who would miss it least
_WORTH = 1e-6  # a step must lower the maximum by this share, so that the search ends


def _pack(weights: np.ndarray, bins: int) -> list[list[int]]:
    """Items into bins of equal size, heavy ones first, each to the lightest bin with room."""
    room = len(weights) // bins
    packed: list[list[int]] = [[] for _ in range(bins)]
    open_bins = [(0.0, number) for number in range(bins)]
    for item in np.argsort(-weights, kind="stable").tolist():
        load, number = heappop(open_bins)
        packed[number].append(item)
        if len(packed[number]) < room:
            heappush(open_bins, (load + float(weights[item]), number))
    return packed


def swap_items(weights: np.ndarray, packed: Sequence[Sequence[int]], enough: float = 0.0) -> list[list[int]]:
    """Swap an item of the heaviest bin with another bin's, the best swap first, as long as the maximum falls.

    enough   stop as soon as no bin is heavier than that
    """
    bins = np.empty(len(weights), dtype=np.int64)
    for number, items in enumerate(packed):
        bins[list(items)] = number
    loads = np.array([weights[list(items)].sum() for items in packed])
    while loads.max() > enough:
        hot = int(np.argmax(loads))
        ours, others = np.flatnonzero(bins == hot), np.flatnonzero(bins != hot)
        if not len(others):
            break
        gain = weights[ours][:, None] - weights[others][None, :]  # what the heaviest bin gets rid of
        after = np.maximum(loads[hot] - gain, loads[bins[others]][None, :] + gain)
        i, j = np.unravel_index(np.argmin(after), after.shape)
        if after[i, j] >= loads[hot] * (1 - _WORTH):
            break
        one, other = ours[i], others[j]
        bins[one], bins[other] = bins[other], bins[one]
        for number in (bins[one], bins[other]):
            loads[number] = weights[bins == number].sum()
    return [np.flatnonzero(bins == number).tolist() for number in range(len(packed))]
