"""Make a schedule faster by small changes to its rows, where they can matter: on the critical path.

A schedule's makespan is the length of one chain of steps, each waiting for the one before it, on its rank or by
message. Only a change to that chain can help (this is the view of job-shop scheduling). So one try picks a step on the
chain and moves it, or takes a backward apart so that its W gets out of the way, or joins or parts a pair; then all
ranks are clocked again. A change that breaks the order, or the memory limit, is undone; one that costs little is now
and then kept, so that the search does not stop at the first hill.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dualpipe.costs import Costs
from dualpipe.schedule import Action, Kind, Pair, Schedule, Step, parts
from dualpipe.simulator import receiver
from dualpipe.timeline import peak_live


@dataclass(frozen=True)
class _Plan:
    """A step as the clock sees it: its time, the results it needs, those it makes and where each of them goes."""

    cost: float
    needs: tuple[int, ...]
    makes: tuple[tuple[int, int], ...]


Row = list[Step]
Place = tuple[int, int]  # rank, position in its row


@dataclass
class Timing:
    """Per rank: what each step waited for (None: for the step before it, if any), and the end of the last."""

    causes: list[list[Place | None]]
    ends: list[float]

    def objective(self) -> float:
        """The makespan; between equals, the one whose ranks are through earlier."""
        return max(self.ends) + 0.01 * sum(self.ends) / len(self.ends)

    def critical_path(self) -> list[Place]:
        """The chain of steps that ends last, from its end to its start."""
        rank = max(range(len(self.ends)), key=self.ends.__getitem__)
        place: Place | None = (rank, len(self.causes[rank]) - 1)
        path = []
        while place is not None and place[1] >= 0:
            path.append(place)
            rank, index = place
            place = self.causes[rank][index] or (rank, index - 1)
        return path


class Clock:
    """Times the rows of one schedule over and over: `simulate`, less everything that the refinement does not need."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule, self.costs = schedule, costs
        self._plans: dict[Step, _Plan] = {}

    def run(self, rows: Sequence[Sequence[_Plan]]) -> Timing | None:
        """Clock all ranks; None if they deadlock."""
        ready: dict[int, tuple[float, Place]] = {}
        waiting: dict[int, int] = {}
        link: dict[tuple[int, int], float] = {}
        position, free = [0] * len(rows), [0.0] * len(rows)
        timing = Timing([[] for _ in rows], [0.0] * len(rows))
        todo = list(range(len(rows)))
        while todo:
            rank = todo.pop()
            row, index, now = rows[rank], position[rank], free[rank]
            while index < len(row):
                plan = row[index]
                start, cause = now, None
                for need in plan.needs:
                    if need not in ready:
                        waiting[need] = rank
                        break
                    arrival = ready[need]
                    if arrival[0] > start:
                        start, cause = arrival
                else:
                    timing.causes[rank].append(cause)
                    now = start + plan.cost
                    for result, target in plan.makes:
                        ready[result] = (self._arrival(link, rank, target, now), (rank, index))
                        if result in waiting:
                            todo.append(waiting.pop(result))
                    index += 1
                    continue
                break
            position[rank], free[rank] = index, now
        if any(position[rank] < len(row) for rank, row in enumerate(rows)):
            return None
        timing.ends = free
        return timing

    def _arrival(self, link: dict[tuple[int, int], float], rank: int, target: int, now: float) -> float:
        if target == rank:
            return now
        leave = max(now, link.get((rank, target), 0.0)) + self.costs.transfer
        link[rank, target] = leave
        return leave + self.costs.latency

    def plans(self, rank: int, row: Row) -> list[_Plan]:
        """A row as `run` takes it."""
        known = self._plans
        for step in row:
            if step not in known:
                known[step] = self._make_plan(rank, step)
        return [known[step] for step in row]

    def _make_plan(self, rank: int, step: Step) -> _Plan:
        needs: list[int] = []
        makes: list[tuple[int, int]] = []
        for action in parts(step):
            kind, stage, mb = action.kind, action.stage, action.micro_batch
            if kind is Kind.W:
                needs.append(self._result(_BACKWARD, stage, mb))
                continue
            if kind is Kind.F:
                if stage > 0:
                    needs.append(self._result(_ACTIVATION, stage - 1, mb))
                makes.append((self._result(_FORWARD, stage, mb), rank))
            else:
                needs.append(self._result(_FORWARD, stage, mb))
                if stage < self.schedule.num_stages - 1:
                    needs.append(self._result(_GRADIENT, stage + 1, mb))
                makes.append((self._result(_BACKWARD, stage, mb), rank))
            target = receiver(self.schedule, action)
            if target is not None:
                cargo = _ACTIVATION if kind is Kind.F else _GRADIENT
                makes.append((self._result(cargo, stage, mb), target))
        return _Plan(self.costs.of(step), tuple(needs), tuple(makes))

    def _result(self, what: int, stage: int, micro_batch: int) -> int:
        return (what * self.schedule.num_stages + stage) * self.schedule.num_micro_batches + micro_batch


# What one step makes for another: on the same rank that F or the backward is done, for a neighbour its cargo.
_FORWARD, _BACKWARD, _ACTIVATION, _GRADIENT = range(4)


class Refiner:
    """Late-acceptance hill climbing: a change is kept if it is not worse than what was kept `memory` tries ago.

    In a bidirectional placement a rank and its mirror have the same work, so what one rank changes its mirror changes
    too, as long as the schedule is symmetric.
    """

    def __init__(
        self, schedule: Schedule, costs: Costs, max_activations: int, rng: random.Random, memory: int = 200
    ) -> None:
        self.best_schedule, self.costs, self.cap, self.rng = schedule, costs, max_activations, rng
        self._pairs = min(costs.overlaps) < 1
        self._clock = Clock(schedule, costs)
        self._rows: list[Row] = [list(row) for row in schedule.steps]
        self._plans = [self._clock.plans(rank, row) for rank, row in enumerate(self._rows)]
        timing = self._clock.run(self._plans)
        if timing is None:
            raise ValueError(f"{schedule.name} deadlocks; only a valid schedule can be refined")
        self._path = timing.critical_path()
        self._objective = self.best = timing.objective()
        self._history = [self._objective] * memory
        self._tries = 0
        self._mirror = _mirror_of(schedule)

    def run(self, tries: int) -> None:
        """Try so many changes; `best_schedule` is the best seen, `best` what it is judged by."""
        for _ in range(tries):
            self._try()

    def _try(self) -> None:
        slot = self._tries % len(self._history)
        self._tries += 1
        rank, index = self.rng.choice(self._path)
        changed = self._changed(self._rows[rank], index)
        if changed is None or peak_live(changed)[0] > self.cap:
            return
        rows = {rank: changed}
        if self._mirror is not None:
            rows[len(self._rows) - 1 - rank] = [self._mirror(step) for step in changed]
        before = {r: self._plans[r] for r in rows}
        for r, row in rows.items():
            self._plans[r] = self._clock.plans(r, row)
        timing = self._clock.run(self._plans)
        if timing is None or timing.objective() > max(self._objective, self._history[slot]) + 1e-12:
            for r, plans in before.items():
                self._plans[r] = plans
            return
        for r, row in rows.items():
            self._rows[r] = row
        self._path, self._objective = timing.critical_path(), timing.objective()
        self._history[slot] = self._objective
        if self._objective < self.best - 1e-12:
            self.best = self._objective
            self.best_schedule = replace(self.best_schedule, steps=tuple(map(tuple, self._rows)))

    def _changed(self, row: Row, index: int) -> Row | None:
        """A copy of the row with one random change at `index`; None if the change drawn does not apply there."""
        rng, step = self.rng, row[index]
        rest = row[:index] + row[index + 1 :]
        draw = rng.random()
        if isinstance(step, Pair):
            return _parted(row, index, rng) if draw < 0.4 else _inserted(rest, _near(index, len(rest), rng), step)
        if step.kind is Kind.W and draw < 0.6:
            first = 1 + rest.index(Action(Kind.I, step.stage, step.micro_batch))
            return _inserted(rest, rng.randint(first, len(rest)), step)
        if step.kind is Kind.B and draw < 0.4:
            rest.insert(index, Action(Kind.I, step.stage, step.micro_batch))
            return _inserted(rest, index + rng.randint(1, 8), Action(Kind.W, step.stage, step.micro_batch))
        if step.kind is Kind.I and draw < 0.3:
            rest.remove(Action(Kind.W, step.stage, step.micro_batch))
            return _inserted(rest, index, Action(Kind.B, step.stage, step.micro_batch))
        if self._pairs and step.kind in (Kind.F, Kind.B) and draw < 0.7:
            return _paired(row, index, rng)
        return _inserted(rest, _near(index, len(rest), rng), step)


def _inserted(row: Row, index: int, step: Step) -> Row:
    return [*row[:index], step, *row[index:]]


def _near(index: int, length: int, rng: random.Random) -> int:
    """A place close to `index`, near ones more often."""
    return min(length, max(0, index + rng.choice((-1, 1)) * rng.choice((1, 1, 1, 2, 2, 3, 4, 6))))


def _parted(row: Row, index: int, rng: random.Random) -> Row:
    pair = row[index]
    assert isinstance(pair, Pair)
    both: Row = [pair.forward, pair.backward]
    if rng.random() < 0.5:
        both.reverse()
    return row[:index] + both + row[index + 1 :]


def _paired(row: Row, index: int, rng: random.Random) -> Row | None:
    """Join the F or B at `index` with a B or F of another micro-batch close by."""
    step = row[index]
    assert isinstance(step, Action)
    wanted = Kind.B if step.kind is Kind.F else Kind.F
    partners = [
        (place, other)
        for place, other in enumerate(row[: index + 5])
        if place >= index - 4
        and isinstance(other, Action)
        and other.kind is wanted
        and other.micro_batch != step.micro_batch
    ]
    if not partners:
        return None
    place, other = rng.choice(partners)
    pair = Pair(step, other) if wanted is Kind.B else Pair(other, step)
    first, last = sorted((index, place))
    between = row[first + 1 : last]
    joined = [pair, *between] if rng.random() < 0.5 else [*between, pair]
    return row[:first] + joined + row[last + 1 :]


def _mirror_of(schedule: Schedule) -> Callable[[Step], Step] | None:
    """What the mirror rank does in place of a step, if the schedule is symmetric."""
    if schedule.num_directions != 2 or schedule.placement[1] != schedule.placement[0][::-1]:
        return None
    num, half = schedule.num_micro_batches, schedule.num_micro_batches // 2

    def of(action: Action) -> Action:
        return Action(action.kind, action.stage, (action.micro_batch + half) % num)

    def mirrored(step: Step) -> Step:
        return Pair(of(step.forward), of(step.backward)) if isinstance(step, Pair) else of(step)

    rows = schedule.steps
    symmetric = all(tuple(map(mirrored, row)) == other for row, other in zip(rows, rows[::-1], strict=True))
    return mirrored if symmetric else None
