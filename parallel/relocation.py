"""From one expert placement to another with few moves of weights.

Ranks of a node are interchangeable, and so are nodes: which of the new plan's sets of experts goes to which rank is an
assignment problem (a set goes where fewest of its experts are missing), solved exactly. Two mends follow, neither
of which lets the heaviest rank become heavier than in the new plan:

- swap experts between ranks of a node as long as that saves moves;
- instead of the new plan, mend the present one with swaps until it balances as well; the cheaper of the two is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.optimize import linear_sum_assignment

from parallel.placement import Loads, Plan, swap_items

_ROUNDING = 1e-9  # sums of the same loads in another order may differ by rounding


@dataclass(frozen=True)
class Move:
    """Rank `target` fetches the weights of an expert from rank `source`."""

    expert: int
    source: int
    target: int


def closest_plan(previous: Plan, wanted: Plan, loads: Loads, nodes: int = 1, slack: float = 0.0) -> Plan:
    """A plan that is as balanced as `wanted` under these loads, reached from `previous` with few moves.

    slack    by which share its heaviest rank may be heavier than in `wanted`; a little saves many moves
    nodes   into how many the ranks are divided; experts change their node only as whole sets of a node, so that
            a hierarchical plan stays one
    Raises ValueError if the plans have different ranks, slots or experts.
    """
    shapes = [(len(p.ranks), sum(map(len, p.ranks)), len(p.copies())) for p in (previous, wanted)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"ranks, slots and experts of the plans differ: {shapes[0]} and {shapes[1]}")
    if len(wanted.ranks) % nodes:
        raise ValueError(f"{len(wanted.ranks)} ranks cannot be divided into {nodes} nodes")
    limit = float(wanted.rank_loads(loads).max()) * (1 + slack) * (1 + _ROUNDING)
    candidates = [_settle(previous, _relabel(previous, wanted, nodes), loads, nodes, limit)]
    mended = _mend(previous, loads, nodes, limit)
    if mended is not None:
        candidates.append(_settle(previous, mended, loads, nodes, limit))
    return min(candidates, key=lambda plan: len(moves(previous, plan)))


def moves(previous: Plan, plan: Plan) -> list[Move]:
    """The weights that have to travel. Holders take turns as sources, those with the fewest moves so far first."""
    found: list[Move] = []
    sent = [0] * len(previous.ranks)
    for target, (before, after) in enumerate(zip(previous.ranks, plan.ranks, strict=True)):
        for expert in sorted(set(after) - set(before)):
            source = min((r for r, rank in enumerate(previous.ranks) if expert in rank), key=lambda r: sent[r])
            sent[source] += 1
            found.append(Move(expert, source, target))
    return found


def _present(plan: Plan) -> np.ndarray:
    """[ranks, experts]: 1 where the rank holds the expert."""
    table = np.zeros((len(plan.ranks), len(plan.copies())), dtype=np.int64)
    for rank, experts in enumerate(plan.ranks):
        table[rank, list(experts)] = 1
    return table


def _relabel(previous: Plan, wanted: Plan, nodes: int) -> Plan:
    """The wanted plan with its nodes, and the ranks within each, exchanged so that fewest experts travel."""
    local = len(wanted.ranks) // nodes
    travel = (1 - _present(previous)) @ _present(wanted).T  # [old rank, new rank]: experts that would have to come
    blocks = travel.reshape(nodes, local, nodes, local).transpose(0, 2, 1, 3)
    inner = [[linear_sum_assignment(blocks[old, new]) for new in range(nodes)] for old in range(nodes)]
    total = np.array([[blocks[o, n][inner[o][n]].sum() for n in range(nodes)] for o in range(nodes)])
    _, new_of_old = linear_sum_assignment(total)
    ranks: list[tuple[int, ...]] = []
    for old, new in enumerate(new_of_old):
        ranks += [wanted.ranks[new * local + rank] for rank in inner[old][new][1]]
    return Plan(tuple(ranks))


def _mend(previous: Plan, loads: Loads, nodes: int, limit: float) -> Plan | None:
    """The previous plan with swaps within nodes until no rank is above the limit; None if they do not get there."""
    per_copy = np.asarray(loads, dtype=np.float64) / previous.copies()
    local = len(previous.ranks) // nodes
    ranks: list[tuple[int, ...]] = []
    for first in range(0, len(previous.ranks), local):
        here = previous.ranks[first : first + local]
        experts = [expert for rank in here for expert in rank]
        ends = np.cumsum([len(rank) for rank in here])
        slots = [list(range(end - len(rank), end)) for rank, end in zip(here, ends, strict=True)]
        packed = swap_items(per_copy[experts], slots, limit)
        ranks += [tuple(sorted(experts[slot] for slot in items)) for items in packed]
    plan = Plan(tuple(ranks))
    return plan if plan.rank_loads(loads).max() <= limit else None


def _settle(previous: Plan, plan: Plan, loads: Loads, nodes: int, limit: float) -> Plan:
    """Swap experts within nodes as long as fewer of them have to travel and no rank exceeds the limit."""
    per_copy = np.asarray(loads, dtype=np.float64) / plan.copies()
    before = [set(rank) for rank in previous.ranks]
    now = [list(rank) for rank in plan.ranks]
    local = len(now) // nodes
    pairs = [p for first in range(0, len(now), local) for p in combinations(range(first, first + local), 2)]
    improved = True
    while improved:
        improved = False
        for a, b in pairs:
            swap = _best_swap(now[a], now[b], before[a], before[b], per_copy, limit)
            if swap is not None:
                now[a][now[a].index(swap[0])], now[b][now[b].index(swap[1])] = swap[1], swap[0]
                improved = True
    return Plan(tuple(tuple(sorted(rank)) for rank in now))


def _best_swap(
    here: Sequence[int],
    there: Sequence[int],
    was_here: set[int],
    was_there: set[int],
    per_copy: np.ndarray,
    limit: float,
) -> tuple[int, int] | None:
    """The experts (of here, of there) whose exchange saves most moves; None if none helps and fits."""
    best, fewest = None, len(set(here) - was_here) + len(set(there) - was_there)
    load_here, load_there = float(per_copy[list(here)].sum()), float(per_copy[list(there)].sum())
    strangers_here = [e for e in set(here) if e not in was_here or here.count(e) > 1]
    strangers_there = [e for e in set(there) if e not in was_there or there.count(e) > 1]
    candidates = [(x, y) for x in strangers_here for y in set(there)] + [
        (x, y) for x in set(here) for y in strangers_there
    ]
    for x, y in candidates:
        if x not in was_there and y not in was_here:
            continue
        change = float(per_copy[y] - per_copy[x])
        if load_here + change > limit or load_there - change > limit:
            continue
        after_here, after_there = list(here), list(there)
        after_here[after_here.index(x)], after_there[after_there.index(y)] = y, x
        now = len(set(after_here) - was_here) + len(set(after_there) - was_there)
        if now < fewest:
            best, fewest = (x, y), now
    return best
