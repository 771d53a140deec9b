"""Who did what when: the result of a simulation, and of a measured run.

The simulator predicts a Timeline and the runtime records one, so predicted and measured are compared and drawn by
the same code. It is plain data: a tuple of spans. On the lane `compute` a span's label is a step of the schedule
(`0F3`, `(0F3;7B1)OVERLAP_F_B`), and what follows from the steps is derived here; other lanes carry labels of any
kind. Times are in the unit of whoever made it: seconds when measured, the unit of the costs when simulated.

What counts as alive. An *activation* is one micro-batch's on one stage; it lives from the start of its F to the end
of its backward, which is B or, when split, W: the inputs of the weights are needed until then. A *deferred weight
gradient* lives from the start of I to the end of W. Inside a pair F starts while B still needs its activation, so both
count. That is the published measure, and what a rank must have room for at most.

What is held at each moment is less, for the runtime lets go earlier: an autograd *graph* lives from its F to the end
of its I or B only (W keeps the inputs that it multiplies), and a pair gives its B's graph back piece by piece while
its F's grows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from dualpipe.schedule import Kind, Step, parse_step, parts

COMPUTE = "compute"
MESSAGES = "messages"
WAITS = "waits"  # for a message, as measured


@dataclass(frozen=True)
class Span:
    """Something that occupied one lane of one rank from `start` to `end`."""

    rank: int
    lane: str
    label: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """All spans of one step of training; ranks are 0 .. num_ranks−1."""

    name: str
    num_ranks: int
    spans: tuple[Span, ...]

    @cached_property
    def start(self) -> float:
        return min((s.start for s in self.spans), default=0.0)

    @cached_property
    def makespan(self) -> float:
        """From the first start to the last end, over all ranks and lanes."""
        return max((s.end for s in self.spans), default=0.0) - self.start

    @cached_property
    def computing(self) -> tuple[tuple[Span, ...], ...]:
        """The compute spans of each rank, in order of time."""
        rows: list[list[Span]] = [[] for _ in range(self.num_ranks)]
        for span in self.spans:
            if span.lane == COMPUTE:
                rows[span.rank].append(span)
        return tuple(tuple(sorted(row, key=lambda s: (s.start, s.end))) for row in rows)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        return tuple(sum(s.end - s.start for s in row) for row in self.computing)

    @cached_property
    def idle(self) -> tuple[float, ...]:
        """Per rank, the part of the makespan in which it computes nothing."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble(self) -> float:
        """The fraction of all ranks' time that is idle."""
        return sum(self.idle) / (self.makespan * self.num_ranks) if self.makespan else 0.0

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """Per rank, the most activations alive at once, counted in stages × micro-batches."""
        return tuple(peak_live(steps(row))[0] for row in self.computing)

    @cached_property
    def peak_graphs(self) -> tuple[int, ...]:
        """Per rank, the most autograd graphs alive at once, as the runtime holds them."""
        return tuple(peak_graphs(steps(row)) for row in self.computing)

    @cached_property
    def peak_deferred(self) -> tuple[int, ...]:
        """Per rank, the most weight gradients whose I has begun and whose W is not over."""
        return tuple(peak_live(steps(row))[1] for row in self.computing)


def steps(spans: Iterable[Span]) -> Iterable[Step]:
    return (parse_step(span.label) for span in spans)


def peak_live(row: Iterable[Step]) -> tuple[int, int]:
    """The most activations, and the most deferred weight gradients, alive at once while a rank runs `row`."""
    live = deferred = peak = peak_deferred = 0
    for step in row:
        kinds = [action.kind for action in parts(step)]
        live += kinds.count(Kind.F)
        deferred += kinds.count(Kind.I)
        peak, peak_deferred = max(peak, live), max(peak_deferred, deferred)
        live -= kinds.count(Kind.B) + kinds.count(Kind.W)
        deferred -= kinds.count(Kind.W)
    return peak, peak_deferred


def peak_graphs(row: Iterable[Step]) -> int:
    """The most autograd graphs alive at once while a rank runs `row`; a pair gives one back for the one it makes."""
    live = peak = 0
    for step in row:
        kinds = [action.kind for action in parts(step)]
        live -= kinds.count(Kind.B) + kinds.count(Kind.I)
        live += kinds.count(Kind.F)
        peak = max(peak, live)
    return peak
