"""What steps and messages cost: the numbers that a simulation, a comparison or a search starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from dualpipe.schedule import Action, Kind, Pair, Step, parts


@dataclass(frozen=True)
class Costs:
    """Times of each stage, in any one unit, and of a message between ranks.

    forward[s], inputs[s], weights[s] are the F, I and W of stage s. backward[s] is its B; left out, it is I + W.
    A pair of F and B takes `overlap` × (F + B): 1 if overlapping hides nothing, less if it hides communication. A tuple
    gives each stage its own, for its half of a pair: a stage of dense layers has nothing to hide.
    A message takes `latency` + `size` / `bandwidth`; on one link (rank to rank, one way) sizes queue, latencies do not.
    """

    forward: tuple[float, ...]
    inputs: tuple[float, ...]
    weights: tuple[float, ...]
    backward: tuple[float, ...] = ()
    overlap: float | tuple[float, ...] = 1.0
    latency: float = 0.0
    size: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        if not self.backward:
            object.__setattr__(self, "backward", tuple(i + w for i, w in zip(self.inputs, self.weights, strict=False)))
        lengths = {len(self.forward), len(self.inputs), len(self.weights), len(self.backward)}
        if isinstance(self.overlap, tuple) and len(self.overlap) not in lengths:
            raise ValueError(
                f"overlap has {len(self.overlap)} values for {len(self.forward)} stages; give one, or one each"
            )
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"costs need one F, I, W and B per stage; got {len(self.forward)}, {len(self.inputs)}, "
                f"{len(self.weights)} and {len(self.backward)}"
            )
        times = (*self.forward, *self.inputs, *self.weights, *self.backward, *self.overlaps, self.latency, self.size)
        for time in times:
            if not (math.isfinite(time) and time >= 0):
                raise ValueError(f"a cost must be finite and at least 0; got {time}")
        if not self.bandwidth > 0:
            raise ValueError(f"the bandwidth must be above 0; got {self.bandwidth}")

    @property
    def num_stages(self) -> int:
        return len(self.forward)

    @cached_property
    def overlaps(self) -> tuple[float, ...]:
        """The part of its F and its B that each stage adds to a pair."""
        return self.overlap if isinstance(self.overlap, tuple) else (self.overlap,) * len(self.forward)

    @property
    def transfer(self) -> float:
        """The time for which one message occupies its link."""
        return self.size / self.bandwidth

    def inputs_part(self, stage: int) -> float:
        """How much of a B is over when the gradient of its inputs is there."""
        whole = self.inputs[stage] + self.weights[stage]
        return self.inputs[stage] / whole if whole else 1.0

    def of(self, step: Step) -> float:
        """The time of one step."""
        if isinstance(step, Pair):
            return sum(self.overlaps[a.stage] * self._action(a) for a in parts(step))
        return self._action(step)

    def _action(self, action: Action) -> float:
        if action.kind is Kind.F:
            return self.forward[action.stage]
        if action.kind is Kind.B:
            return self.backward[action.stage]
        return (self.inputs if action.kind is Kind.I else self.weights)[action.stage]

    def split(self, ways: int) -> Costs:
        """The same model cut `ways` times as fine: each stage becomes that many equal ones."""

        def cut(times: Sequence[float]) -> tuple[float, ...]:
            return tuple(time / ways for time in times for _ in range(ways))

        overlap = (
            tuple(x for x in self.overlaps for _ in range(ways)) if isinstance(self.overlap, tuple) else self.overlap
        )
        return replace(
            self,
            forward=cut(self.forward),
            inputs=cut(self.inputs),
            weights=cut(self.weights),
            backward=cut(self.backward),
            overlap=overlap,
        )

    def merged(self, ways: int) -> Costs:
        """The same model cut more coarsely: every `ways` neighbouring stages become one."""
        if ways < 1 or self.num_stages % ways:
            raise ValueError(f"{self.num_stages} stages cannot be merged {ways} by {ways}")

        def joined(times: Sequence[float]) -> tuple[float, ...]:
            return tuple(sum(times[s : s + ways]) for s in range(0, len(times), ways))

        whole = [f + b for f, b in zip(self.forward, self.backward, strict=True)]
        hidden = joined([x * time for x, time in zip(self.overlaps, whole, strict=True)])
        overlap = tuple(part / time if time else 1.0 for part, time in zip(hidden, joined(whole), strict=True))
        return replace(
            self,
            forward=joined(self.forward),
            inputs=joined(self.inputs),
            weights=joined(self.weights),
            backward=joined(self.backward),
            overlap=overlap if isinstance(self.overlap, tuple) else self.overlap,
        )


def uniform(
    num_stages: int, forward: float = 1.0, backward: float = 2.0, weights: float = 1.0, pair: float | None = None
) -> Costs:
    """Equal stages, in the terms of the DualPipe paper: F, B, W (of which I is the rest of B) and F&B."""
    if not 0 <= weights <= backward:
        raise ValueError(f"W is a part of B: give weights between 0 and {backward}; got {weights}")
    whole = forward + backward
    return Costs(
        forward=(forward,) * num_stages,
        inputs=(backward - weights,) * num_stages,
        weights=(weights,) * num_stages,
        backward=(backward,) * num_stages,
        overlap=1.0 if pair is None or not whole else pair / whole,
    )
