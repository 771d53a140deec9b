"""Hill climbing over the policies of `greedy.py`: change a few numbers, keep what is not slower, restart when stuck."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from dualpipe.greedy import Policy, Problem, Rows, run_policy
from dualpipe.schedule import Action, Kind, Schedule, Step

T = TypeVar("T")


def held_stages(problem: Problem) -> list[list[int]]:
    """The stages that each rank holds, one entry per direction and stage."""
    return [
        [stage for row in problem.placement for stage, owner in enumerate(row) if owner == rank]
        for rank in range(problem.num_ranks)
    ]


def first_policy(problem: Problem, model: Schedule | None = None) -> Policy:
    """Backward before forward before W, deep stages first; early stages may keep more, as in 1F1B and DualPipe.

    `model` is a schedule whose number of actions outside pairs is taken over, rank by rank.
    """
    stages, ranks, cap = problem.costs.num_stages, problem.num_ranks, problem.max_activations
    crowd = max(map(len, held_stages(problem)))
    slope = (cap - crowd) / max(1, stages - 1)
    lone = [_outside_pairs(row) for row in model.steps] if model is not None else [(_ANY, _ANY)] * ranks
    return Policy(
        limit=tuple(max(1, cap + 1 - crowd - round(slope * s)) if crowd > 1 else cap for s in range(stages)),
        reserve=(1,) * stages,
        forward=tuple(s / stages / 10 for s in range(stages)),
        backward=tuple(1 + s / stages / 10 for s in range(stages)),
        whole=(False,) * stages,
        defer=(cap,) * ranks,
        patience=(0.5,) * ranks,
        hold=(0.0,) * ranks,
        lone_forwards=tuple(forwards for forwards, _ in lone),
        lone_backwards=tuple(backwards for _, backwards in lone),
    )


_ANY = 1_000_000  # as many as there are


def _outside_pairs(row: Sequence[Step]) -> tuple[int, int]:
    """How many F a row has outside pairs, and how many backwards before its last F."""
    lone = [step.kind if isinstance(step, Action) else None for step in row]
    last = max(index for index, kind in enumerate(lone) if kind in (Kind.F, None))
    return lone.count(Kind.F), sum(kind in (Kind.B, Kind.I) for kind in lone[:last])


class Climber:
    """Climbs for one problem. `best` is what its best policy writes, and how long it takes."""

    def __init__(self, problem: Problem, models: Sequence[Schedule], rng: random.Random, patience: int = 150) -> None:
        self.problem, self.rng, self.patience = problem, rng, patience
        self._seeds = [first_policy(problem), *(first_policy(problem, model) for model in models)]
        self._held = held_stages(problem)
        self._fields = [*_ALWAYS, *(_WITH_PAIRS if min(problem.costs.overlaps) < 1 else ())]
        self._restarts = self._stuck = 0
        self._policy, self._makespan = self._seeds[0], math.inf
        self.best: tuple[Rows, float] | None = None
        self.best_policy = self._policy

    def climb(self) -> None:
        """Try one policy."""
        if self._stuck > self.patience:
            self._restart()
        candidate = self._policy if self._makespan == math.inf else self._mutated(self._policy)
        found = run_policy(self.problem, candidate, self._makespan)
        self._stuck += 1
        if found is None:
            if self._makespan == math.inf:
                self._restart()
            return
        if found[1] < self._makespan - 1e-9:
            self._stuck = 0
        self._policy, self._makespan = candidate, min(self._makespan, found[1])
        if self.best is None or found[1] < self.best[1] - 1e-9:
            self.best, self.best_policy = found, candidate

    def _restart(self) -> None:
        """From the next seed; when all have had their turn, from changed ones."""
        self._restarts, self._stuck, self._makespan = self._restarts + 1, 0, math.inf
        self._policy = self._seeds[self._restarts % len(self._seeds)]
        if self._restarts >= len(self._seeds):
            for _ in range(2 * self.problem.num_ranks):
                self._policy = self._mutated(self._policy)

    def _mutated(self, policy: Policy) -> Policy:
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            policy = self._changed(policy)
        return policy

    def _changed(self, policy: Policy) -> Policy:
        rng, cap = self.rng, self.problem.max_activations
        field = rng.choice(self._fields)
        values: tuple[Any, ...] = getattr(policy, field)
        if field in _PER_RANK:
            return replace(policy, **{field: self._for_rank(values, field)})
        stage = rng.randrange(len(values))
        old, new = values[stage], values[stage]
        if field == "limit":
            new = min(cap, max(1, old + rng.choice((-2, -1, 1, 2))))
        elif field == "reserve":
            new = max(1, old + rng.choice((-1, 1)))
        elif field == "whole":
            new = not old
        else:
            new = old + rng.gauss(0, 0.5)
        changed = _put(values, stage, new)
        if field == "reserve" and any(sum(changed[s] for s in held) > cap for held in self._held):
            return policy
        return replace(policy, **{field: changed})

    def _for_rank(self, values: tuple[Any, ...], field: str) -> tuple[Any, ...]:
        """One rank's number changed; in a bidirectional placement its mirror, which has the same work, goes along."""
        rng, num = self.rng, self.problem.num_micro_batches
        rank = rng.randrange(len(values))
        if field == "defer":
            new: Any = rng.randrange(self.problem.max_activations + 1)
        elif field == "patience":
            new = rng.random()
        elif field == "hold":
            new = 3 * rng.random()
        else:
            new = min(2 * num, max(0, min(values[rank], 2 * num) + rng.choice((-2, -1, 1, 2))))
        values = _put(values, rank, new)
        return _put(values, len(values) - 1 - rank, new) if len(self.problem.placement) == 2 else values


_ALWAYS = ("limit", "reserve", "forward", "backward", "defer", "patience", "whole")
_WITH_PAIRS = ("hold", "lone_forwards", "lone_backwards", "lone_forwards", "lone_backwards")
_PER_RANK = frozenset(("defer", "patience", *_WITH_PAIRS))


def _put(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])
