"""Predict a schedule's Timeline from costs, by running it with a clock per rank.

A rank runs its steps in order. A step starts when the rank is free and everything it depends on has arrived; what it
computed leaves at its end (or, as in the runtime, as soon as it is there: `early`). Between ranks a message queues for
its link (source, destination), occupies it for size / bandwidth, and arrives `latency` later. Computing never waits for
a link.
"""

from __future__ import annotations

from dualpipe.costs import Costs
from dualpipe.schedule import Action, Kind, Pair, Schedule, Step, parts
from dualpipe.timeline import COMPUTE, MESSAGES, Span, Timeline
from dualpipe.validate import InvalidScheduleError, dependencies


def simulate(schedule: Schedule, costs: Costs, early: bool = False) -> Timeline:
    """Run the schedule on paper. Raises ValueError if the costs are for another number of stages or it deadlocks.

    early   A step's results leave at its end: so the published bubbles are computed. The runtime is a little better,
            and with `early` so is the simulation, for stages of one piece: a B sends its gradient after its I, and a
            pair runs its B first, so that its gradient leaves early and its F may arrive late.
    """
    if costs.num_stages != schedule.num_stages:
        raise ValueError(f"{schedule.name} has {schedule.num_stages} stages, the costs are for {costs.num_stages}")
    clock = _Clock(schedule, costs, early)
    position = [0] * schedule.num_ranks
    progress = True
    while progress:
        progress = False
        for rank, row in enumerate(schedule.steps):
            while position[rank] < len(row) and clock.run(rank, row[position[rank]]):
                position[rank] += 1
                progress = True
    for rank, row in enumerate(schedule.steps):
        if position[rank] < len(row):
            raise InvalidScheduleError(f"{schedule.name}: rank {rank} waits for ever at {row[position[rank]]}")
    return Timeline(schedule.name, schedule.num_ranks, tuple(clock.spans))


class _Clock:
    """The state of one simulation: when each rank is free, each result ready, each link clear."""

    def __init__(self, schedule: Schedule, costs: Costs, early: bool) -> None:
        self.schedule, self.costs, self.early = schedule, costs, early
        self.free = [0.0] * schedule.num_ranks
        self.done: dict[Action, float] = {}  # on the rank that computed it
        self.arrived: dict[Action, float] = {}  # on the neighbour that needs it
        self.link: dict[tuple[int, int], float] = {}
        self.spans: list[Span] = []

    def run(self, rank: int, step: Step) -> bool:
        """Run one step, unless something that it depends on has not yet been computed."""
        ready = [self._ready(action) for action in parts(step)]
        if None in ready:
            return False
        times = [self.free[rank], *(time for time in ready if time is not None)]
        if self.early:
            self._run_early(rank, step, times)
            return True
        start = max(times)
        end = start + self.costs.of(step)
        self._finish(rank, step, start, end)
        for action in parts(step):
            self._send(rank, action, end)
        return True

    def _run_early(self, rank: int, step: Step, times: list[float]) -> None:
        """`times`: when the rank is free, then when each part of the step has its input."""
        costs = self.costs
        if isinstance(step, Pair):
            forward, backward = (costs.overlaps[a.stage] * costs.of(a) for a in parts(step))
            start = max(times[0], times[2])
            middle = max(start + backward, times[1])
            end = middle + forward
            self._finish(rank, step, end - forward - backward, end)
            self._send(rank, step.backward, start + backward * costs.inputs_part(step.backward.stage))
            self._send(rank, step.forward, end)
            return
        start = max(times)
        end = start + costs.of(step)
        self._finish(rank, step, start, end)
        part = costs.inputs_part(step.stage) if step.kind is Kind.B else 1.0
        self._send(rank, step, start + part * (end - start))

    def _ready(self, action: Action) -> float | None:
        """When everything that an action depends on is there; None if something has not been computed."""
        latest = 0.0
        for alternatives in dependencies(self.schedule, action):
            ready = [self._when(action, a) for a in alternatives if a in self.done]
            if not ready:
                return None
            latest = max(latest, min(ready))
        return latest

    def _finish(self, rank: int, step: Step, start: float, end: float) -> None:
        self.free[rank] = end
        self.spans.append(Span(rank, COMPUTE, str(step), start, end))
        for action in parts(step):
            self.done[action] = end

    def _when(self, action: Action, needed: Action) -> float:
        same = action.stage == needed.stage
        return self.done[needed] if same else self.arrived.get(needed, self.done[needed])

    def _send(self, rank: int, action: Action, ready: float) -> None:
        target = receiver(self.schedule, action)
        if target is None or target == rank:
            return
        leave = max(ready, self.link.get((rank, target), 0.0))
        self.link[rank, target] = leave + self.costs.transfer
        arrival = leave + self.costs.transfer + self.costs.latency
        self.arrived[action] = arrival
        if arrival > ready:
            self.spans.append(Span(rank, MESSAGES, f"{action} to {target}", leave, arrival))


def receiver(schedule: Schedule, action: Action) -> int | None:
    """The rank that waits for the result of an action: of the next stage for F, the previous one for B and I."""
    stage = action.stage + (1 if action.kind == "F" else -1)
    if action.kind == "W" or not 0 <= stage < schedule.num_stages:
        return None
    return schedule.rank_of(stage, action.micro_batch)
