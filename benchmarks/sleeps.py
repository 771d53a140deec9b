"""What the sleeps of an emulated device cost, and the makespan that a schedule has with them.

A sleep costs more than was asked for, and not always the same. Three accounts of it, each measured without a pipeline:

    as long as sleeps last    all sleep alike: the median of how long one lasts
    what sleeps cost          all sleep alike: what a row of F, I and W takes longer with sleeps than without, which
                              counts the cold processor that a sleep leaves behind
    as they cost one by one   every action gets a cost of its own, drawn from those that were measured. Where ranks wait
                              for each other the latest one counts, and no mean shows that
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dualpipe.costs import Costs
from dualpipe.schedule import Action, Kind, Schedule
from dualpipe.simulator import simulate

Trio = tuple[float, float, float]  # seconds of F, of I and of W
DRAWINGS = 15


@dataclass(frozen=True)
class Sleeping:
    """How long a sleep lasts, what it costs in the mean, and what it cost in each F, I and W, in seconds."""

    lasts: float
    cost: float
    trios: Sequence[Trio]

    @staticmethod
    def of(lasts: Sequence[float], with_sleeps: float, without: float, trios: Sequence[Trio], count: int) -> Sleeping:
        """From `count` actions that took this long altogether, and how long each took with its sleep."""
        code = without / count  # what an action takes without its sleep is the stage's own
        costs = [(f - code, i - code, w - code) for f, i, w in trios]
        return Sleeping(statistics.median(lasts), with_sleeps / count - code, costs)

    def makespans(self, schedule: Schedule, latency: float, early: bool) -> dict[str, float]:
        """The simulated makespan by each account. `early`: results leave before the end of their step."""

        def alike(seconds: float) -> float:
            lengths = (seconds,) * schedule.num_stages
            return simulate(schedule, Costs(lengths, lengths, lengths, latency=latency), early=early).makespan

        return {
            "as long as sleeps last": alike(self.lasts),
            "what sleeps cost": alike(self.cost),
            "as they cost one by one": self._one_by_one(schedule, latency, early),
        }

    def _one_by_one(self, schedule: Schedule, latency: float, early: bool) -> float:
        """The median of some drawings. B costs as much as an I and a W, each drawn."""
        times = dict(zip((Kind.F, Kind.I, Kind.W), zip(*self.trios, strict=True), strict=True))
        means = {kind: (statistics.mean(some),) * schedule.num_stages for kind, some in times.items()}
        chance = random.Random(0)

        def draw(kind: Kind) -> float:
            return draw(Kind.I) + draw(Kind.W) if kind is Kind.B else chance.choice(times[kind])

        makespans = []
        for _ in range(DRAWINGS):
            actions = {a: draw(a.kind) for rank in range(schedule.num_ranks) for a in schedule.actions(rank)}
            costs = _Drawn(means[Kind.F], means[Kind.I], means[Kind.W], latency=latency, actions=actions)
            makespans.append(simulate(schedule, costs, early=early).makespan)
        return statistics.median(makespans)


@dataclass(frozen=True)
class _Drawn(Costs):
    """Costs of which each action has its own."""

    actions: Mapping[Action, float] = field(default_factory=dict)

    def _action(self, action: Action) -> float:
        return self.actions[action]
