"""Deferred weight gradients moved into idle time that was measured.

A schedule puts each W where the costs it was made for leave a gap. Real costs differ, a rank is slower than the
others, a link is busy: then a rank waits for a message while its W stand further down. Whether a message is about
to come cannot be asked (gloo's receives have no state to look at), so the runtime looks back: where this rank
waited in the last steps for longer than a W takes, the next step runs one there.

Moving a W forward is always allowed: it needs its own I alone, nobody waits for it, and the activation that it
holds is freed sooner. No W passes another W or a B, so the sums in the gradients stay bit-equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dualpipe.schedule import Action, Kind, Step, parts


def fill_idle(row: Sequence[Step], idle: Mapping[Step, float], weights: Mapping[int, float]) -> tuple[Step, ...]:
    """One rank's row with its W moved to where they fit.

    idle[step]       how long the rank has nothing to do before a step (missing: not at all)
    weights[stage]   how long a W of a stage takes
    """
    if max(idle.values(), default=0.0) < min(weights.values(), default=math.inf):
        return tuple(row)  # nothing fits anywhere
    queue = _weights_in_order(row)
    moved: set[Step] = set()
    begun: set[tuple[int, int]] = set()
    result: list[Step] = []
    whole = 0  # backwards that have run as B
    for step in row:
        if step in moved:
            continue
        left = idle.get(step, 0.0)
        while queue and queue[0][0] is not step:
            weight, before = queue[0]
            cost = weights.get(weight.stage, math.inf)
            if cost > left or before != whole or (weight.stage, weight.micro_batch) not in begun:
                break
            left -= cost
            moved.add(weight)
            result.append(weight)
            queue.pop(0)
        if queue and queue[0][0] is step:
            queue.pop(0)
        for action in parts(step):
            whole += action.kind is Kind.B
            if action.kind is Kind.I:
                begun.add((action.stage, action.micro_batch))
        result.append(step)
    return tuple(result)


def _weights_in_order(row: Sequence[Step]) -> list[tuple[Action, int]]:
    """Each W of the row, and how many B stand before it."""
    found = []
    whole = 0
    for step in row:
        if isinstance(step, Action) and step.kind is Kind.W:
            found.append((step, whole))
        whole += sum(action.kind is Kind.B for action in parts(step))
    return found


class IdleMeter:
    """Measures one rank's waits and W, step for step, and says how long it would be idle before each action.

    A wait counts with the W that were moved in front of it: that is the time there was to fill. Of the last passes
    the shortest counts, so one hiccup moves nothing. If nothing is left of a wait once it is filled, the message may
    have come earlier and found the rank busy: so much is not moved there again.
    """

    def __init__(self, passes: int = 3) -> None:
        self._passes = passes
        self._waits: dict[Step, list[float]] = {}
        self._weights: dict[int, list[float]] = {}
        self._limit: dict[Step, float] = {}
        self._filled: list[float] = []

    def note(self, step: Step, waited: float, took: float, early: bool) -> None:
        """A step ran: how long it waited for its messages, how long it computed; `early`: it is a moved W."""
        if isinstance(step, Action) and step.kind is Kind.W:
            _keep(self._weights.setdefault(step.stage, []), took, self._passes)
            if early:
                self._filled.append(took)
            return
        filled = sum(self._filled)
        if self._filled and waited < 0.1 * self._filled[-1]:
            self._limit[step] = min(self._limit.get(step, math.inf), filled - self._filled[-1] / 2)
        _keep(self._waits.setdefault(step, []), waited + filled, self._passes)
        self._filled.clear()

    @property
    def idle(self) -> dict[Step, float]:
        return {
            step: min(*times, self._limit.get(step, math.inf))
            for step, times in self._waits.items()
            if len(times) == self._passes
        }

    @property
    def weights(self) -> dict[int, float]:
        return {stage: sorted(times)[len(times) // 2] for stage, times in self._weights.items()}


def _keep(times: list[float], newest: float, count: int) -> None:
    times.append(newest)
    del times[:-count]
