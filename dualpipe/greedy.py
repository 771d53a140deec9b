"""Write a schedule by running it: whenever a rank is free, a policy picks what it does next.

This is list scheduling. A clock goes from event to event; a free rank looks at what has arrived and takes the action
of highest priority. Micro-batches pass each stage in order, so per stage there is at most one F and one backward to
choose. A *policy* is a handful of numbers per stage and rank; `policies.py` varies them.

Memory. A rank may hold `max_activations` in all and `limit[s]` of stage s. Of its places, `reserve[s]` ≥ 1 are kept
for each stage that it holds, so the oldest unfinished micro-batch of a direction finds a place everywhere. What can
still deadlock is a rank that waits for the other half of a pair which never comes; such a policy writes nothing.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

from dualpipe.costs import Costs
from dualpipe.schedule import Action, Kind, Pair, Placement, Step

Rows = tuple[tuple[Step, ...], ...]


@dataclass(frozen=True)
class Problem:
    """What is to be scheduled: M micro-batches over a placement, at these costs, within this memory per rank."""

    placement: Placement
    num_ranks: int
    num_micro_batches: int
    costs: Costs
    max_activations: int


@dataclass(frozen=True)
class Policy:
    """How a free rank chooses. Tuples are per stage, unless they say per rank."""

    limit: tuple[int, ...]  # most live activations of the stage on a rank
    reserve: tuple[int, ...]  # places kept for the stage
    forward: tuple[float, ...]  # priority of F
    backward: tuple[float, ...]  # priority of the backward
    whole: tuple[bool, ...]  # backward as B, not as I and a later W
    defer: tuple[int, ...]  # per rank: with more W than this waiting, W comes first; else last
    patience: tuple[float, ...]  # per rank: leave W if something better arrives within this part of its time
    hold: tuple[float, ...]  # per rank: wait for the other half of a pair up to this multiple of what the pair saves
    lone_forwards: tuple[int, ...]  # per rank: F that may run outside pairs
    lone_backwards: tuple[int, ...]  # per rank: backwards that may, as long as there is an F to pair with


def run_policy(problem: Problem, policy: Policy, bound: float = math.inf) -> tuple[Rows, float] | None:
    """What a policy writes, and its makespan; None for a deadlock, or as soon as it is sure to end after `bound`."""
    writer = _Writer(problem, policy)
    if not writer.run(bound):
        return None
    return tuple(map(tuple, writer.rows)), max(writer.free)


class _Slot:
    """One stage on one rank for one direction: what has arrived there, and how far it is."""

    __slots__ = ("arrived_b", "arrived_f", "backwards", "direction", "first", "forwards", "live", "rank", "stage")

    def __init__(self, rank: int, direction: int, stage: int, first: int) -> None:
        self.rank, self.direction, self.stage = rank, direction, stage
        self.first = first  # micro-batch
        self.arrived_f: list[float] = []
        self.arrived_b: list[float] = []
        self.forwards = self.backwards = self.live = 0

    def when_f(self) -> float:
        """When the next forward can start; infinite while that is not known."""
        return self.arrived_f[self.forwards] if self.forwards < len(self.arrived_f) else math.inf

    def when_b(self) -> float:
        return self.arrived_b[self.backwards] if self.backwards < len(self.arrived_b) else math.inf


class _Rank:
    """One rank: its slots, the W that wait, and what it has left to do."""

    __slots__ = ("deferred", "forwards", "left", "lone_backwards", "lone_forwards", "number", "slots")

    def __init__(self, number: int, slots: list[_Slot], forwards: int, left: float) -> None:
        self.number, self.slots = number, slots
        self.deferred: deque[tuple[_Slot, int]] = deque()
        self.forwards = forwards  # to come
        self.left = left  # at least so much computing
        self.lone_forwards = self.lone_backwards = 0  # so far


class _Writer:
    def __init__(self, problem: Problem, policy: Policy) -> None:
        self.policy, self.costs, self.room = policy, problem.costs, problem.max_activations
        self.pairs = min(problem.costs.overlaps) < 1
        self.least = min(1.0, *problem.costs.overlaps)
        self.depth = len(problem.placement[0])
        self.share = problem.num_micro_batches // len(problem.placement)
        self.grid = [
            [_Slot(rank, d, stage, d * self.share) for stage, rank in enumerate(row)]
            for d, row in enumerate(problem.placement)
        ]
        for row in self.grid:
            row[0].arrived_f = [0.0] * self.share
        self.ranks = [self._rank(number) for number in range(problem.num_ranks)]
        self.rows: list[list[Step]] = [[] for _ in self.ranks]
        self.free = [0.0] * problem.num_ranks
        self.link: dict[tuple[int, int], float] = {}
        self.events = [(0.0, rank) for rank in range(problem.num_ranks)]
        self.actions_left = 2 * sum(rank.forwards for rank in self.ranks)

    def _rank(self, number: int) -> _Rank:
        slots = [slot for row in self.grid for slot in row if slot.rank == number]
        costs = self.costs
        work = (
            costs.forward[s] + min(costs.backward[s], costs.inputs[s] + costs.weights[s])
            for s in (slot.stage for slot in slots)
        )
        return _Rank(number, slots, self.share * len(slots), self.share * sum(work) * self.least)

    def run(self, bound: float) -> bool:
        while self.events:
            now, number = heapq.heappop(self.events)
            if self.free[number] > now:
                continue  # it wakes again when it is free
            rank = self.ranks[number]
            cost = self._choose(rank, now)
            if cost is None:
                continue
            rank.left -= cost * self.least
            if self.free[number] + rank.left > bound + 1e-9:
                return False
        return not self.actions_left

    def _choose(self, rank: _Rank, now: float) -> float | None:
        """Start what the policy prefers, or wait. Returns the time of what was started."""
        policy = self.policy
        best_f, best_b, soonest = None, None, math.inf
        score_f = score_b = -math.inf
        room = False  # for any F that is still to come
        for slot in rank.slots:
            if slot.forwards < self.share and self._admits(rank, slot):
                room = True
                when = slot.when_f()
                if when > now:
                    soonest = min(soonest, when)
                elif policy.forward[slot.stage] > score_f:
                    best_f, score_f = slot, policy.forward[slot.stage]
            when = slot.when_b()
            if when > now:
                soonest = min(soonest, when)
            elif policy.backward[slot.stage] > score_b:
                best_b, score_b = slot, policy.backward[slot.stage]
        waiting = rank.deferred
        if len(waiting) > policy.defer[rank.number]:
            return self._weights(rank, now)
        if self.pairs and best_f is not None and best_b is not None:
            return self._pair(rank, best_f, best_b, now)
        if self.pairs and self._pairs_only(rank, best_f is not None, room):
            best_f = best_b = None
        if best_f is not None or best_b is not None:
            if self.pairs and self._worth_waiting(rank, now, best_f, best_b):
                return None
            if best_b is None or (best_f is not None and score_f > score_b):
                assert best_f is not None
                return self._forward(rank, best_f, now)
            return self._backward(rank, best_b, now)
        if waiting:
            patience = policy.patience[rank.number] * self.costs.weights[waiting[0][0].stage]
            if soonest > now + patience:
                return self._weights(rank, now)
        return None

    def _admits(self, rank: _Rank, slot: _Slot) -> bool:
        """Is there a place for one more activation of this slot?"""
        if slot.live >= self.policy.limit[slot.stage]:
            return False
        taken = 0
        for other in rank.slots:
            reserve = self.policy.reserve[other.stage]
            taken += other.live if other is slot or other.live > reserve else reserve
        return taken < self.room

    def _pairs_only(self, rank: _Rank, has_forward: bool, room: bool) -> bool:
        """Has the rank used up what may run outside pairs? A backward that makes room for the F is always allowed."""
        if has_forward:
            return rank.lone_forwards >= self.policy.lone_forwards[rank.number]
        return room and rank.lone_backwards >= self.policy.lone_backwards[rank.number]

    def _worth_waiting(self, rank: _Rank, now: float, forward: _Slot | None, backward: _Slot | None) -> bool:
        """Does the other half of a pair arrive so soon that waiting costs less than overlapping saves?"""
        have = forward or backward
        assert have is not None
        cost = self.costs.forward[have.stage] if forward is not None else self.costs.backward[have.stage]
        margin = self.policy.hold[rank.number] * (1 - self.costs.overlaps[have.stage]) * cost
        if margin <= 0:
            return False
        for slot in rank.slots:
            if forward is not None and slot.when_b() <= now + margin:
                return True
            if backward is not None and slot.when_f() <= now + margin and self._admits(rank, slot):
                return True
        return False

    def _forward(self, rank: _Rank, slot: _Slot, now: float) -> float:
        cost = self.costs.forward[slot.stage]
        self.rows[rank.number].append(self._take_forward(rank, slot))
        rank.lone_forwards += 1
        self._finish(rank, now + cost)
        self._send_forward(slot, now + cost)
        return cost

    def _backward(self, rank: _Rank, slot: _Slot | None, now: float) -> float:
        assert slot is not None
        stage, micro_batch = slot.stage, slot.first + slot.backwards
        if self.policy.whole[stage]:
            cost, kind = self.costs.backward[stage], Kind.B
            slot.live -= 1
        else:
            cost, kind = self.costs.inputs[stage], Kind.I
            rank.deferred.append((slot, micro_batch))
        slot.backwards += 1
        self.actions_left -= 1
        rank.lone_backwards += 1
        self.rows[rank.number].append(Action(kind, stage, micro_batch))
        self._finish(rank, now + cost)
        self._send_backward(slot, now + cost)
        return cost

    def _weights(self, rank: _Rank, now: float) -> float:
        slot, micro_batch = rank.deferred.popleft()
        slot.live -= 1
        cost = self.costs.weights[slot.stage]
        self.rows[rank.number].append(Action(Kind.W, slot.stage, micro_batch))
        self._finish(rank, now + cost)
        return cost

    def _pair(self, rank: _Rank, forward: _Slot, backward: _Slot, now: float) -> float:
        pair = Pair(
            self._take_forward(rank, forward), Action(Kind.B, backward.stage, backward.first + backward.backwards)
        )
        backward.backwards += 1
        backward.live -= 1
        self.actions_left -= 1
        end = now + self.costs.of(pair)
        self.rows[rank.number].append(pair)
        self._finish(rank, end)
        self._send_forward(forward, end)
        self._send_backward(backward, end)
        return self.costs.forward[forward.stage] + self.costs.backward[backward.stage]

    def _take_forward(self, rank: _Rank, slot: _Slot) -> Action:
        action = Action(Kind.F, slot.stage, slot.first + slot.forwards)
        slot.forwards += 1
        slot.live += 1
        rank.forwards -= 1
        self.actions_left -= 1
        return action

    def _finish(self, rank: _Rank, end: float) -> None:
        self.free[rank.number] = end
        heapq.heappush(self.events, (end, rank.number))

    def _send_forward(self, slot: _Slot, ready: float) -> None:
        if slot.stage + 1 == self.depth:
            slot.arrived_b.append(ready)
        else:
            target = self.grid[slot.direction][slot.stage + 1]
            target.arrived_f.append(self._arrival(slot.rank, target.rank, ready))

    def _send_backward(self, slot: _Slot, ready: float) -> None:
        if slot.stage > 0:
            target = self.grid[slot.direction][slot.stage - 1]
            target.arrived_b.append(self._arrival(slot.rank, target.rank, ready))

    def _arrival(self, source: int, target: int, ready: float) -> float:
        if source == target:
            return ready
        leave = max(ready, self.link.get((source, target), 0.0)) + self.costs.transfer
        self.link[source, target] = leave
        heapq.heappush(self.events, (leave + self.costs.latency, target))
        return leave + self.costs.latency
