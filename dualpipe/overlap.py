"""In which order do the pieces of a chunk, or of two chunks at once, run?

A piece is one part of one segment: F (forward), I (backward for inputs) or W (weight gradients); or the chunk's own
point-to-point message, which hands its result to the neighbour stage. A communication piece only starts here and is
waited for where its result is read (`chunk.py`), so everything between start and use hides it. For MoE layers the
order below is the report's Fig. 4, ▲ backward and △ forward:

    compute  MLP(B)▲  MLP(W)▲  MLP(F)△   ATTN(B)▲  ATTN(W)▲  ATTN(F)△
    comm     DISPATCH(F)△  DISPATCH(B)▲  COMBINE(F)△  P2P  COMBINE(B)▲

Two rules make it. Inside a chunk, communication starts as soon as it can, and what does not need its result stands
under it: the weight gradients that are at hand, then segments that do not read it. Between chunks, both orders are
cut into beats, a run of compute pieces and the communication that they make possible, and the beats alternate, the
backward's first: while one chunk communicates, the other one computes. Nothing asks for equal layers: a dense layer
is a beat without communication, and the longer chunk's tail runs on alone.

The order depends on the segments only, so it is data: printable, comparable, and for each single chunk the same with
overlap on and off. That is why gradients are bit-equal either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import zip_longest

from dualpipe.schedule import Kind
from dualpipe.stage import Lane, Segment

MESSAGE = -1  # the index of a piece that is no segment, but the chunk's message to the neighbour stage


@dataclass(frozen=True)
class Piece:
    """One part (F, I or W) of segment `index`, called `name`.

    `brief` is communication of a few bytes, which carries no gradient: it ends no beat.
    """

    part: Kind
    index: int
    name: str
    lane: Lane
    brief: bool = False

    def __str__(self) -> str:
        return f"{self.name}({self.part.value})"

    @property
    def is_message(self) -> bool:
        return self.index == MESSAGE


class Side(IntEnum):
    """Which chunk of a pair a piece belongs to."""

    FORWARD = 0
    BACKWARD = 1


Paired = tuple[Side, Piece]


def message(part: Kind) -> Piece:
    """Hand the outputs (F) or the gradients of the inputs (I) to the neighbour stage."""
    return Piece(part, MESSAGE, "p2p", Lane.COMM)


def forward_order(segments: Sequence[Segment]) -> list[Piece]:
    """The segments as they stand: the stage has put what can run under a communication behind it."""
    pieces = (Piece(Kind.F, i, s.name, s.lane, brief=not s.has_backward) for i, s in enumerate(segments))
    return [*pieces, message(Kind.F)]


def backward_order(segments: Sequence[Segment], weights: bool = True) -> list[Piece]:
    """Segments from last to first, communication as early and its readers as late as the gradients allow.

    The gradients of the inputs leave before the last W. With `weights=False` the W pieces are left out: the schedule
    runs them later (`weight_order`).
    """
    flows = _Flows(segments)
    todo = [i for i in reversed(range(len(segments))) if segments[i].has_backward]
    order: list[Piece] = []
    at_hand: list[Piece] = []  # W pieces that may run under the next communication
    under_way: set[int] = set()  # communication that nobody has waited for yet
    while todo:
        index = flows.next(todo, under_way)
        segment = segments[index]
        if segment.lane is Lane.COMPUTE:
            order += at_hand
            at_hand = [Piece(Kind.W, index, segment.name, Lane.COMPUTE)] if weights else []
        under_way -= flows.feeding(index)
        if segment.lane is Lane.COMM:
            under_way.add(index)
        order.append(Piece(Kind.I, index, segment.name, segment.lane))
        todo.remove(index)
        flows.done.add(index)
    return [*order, message(Kind.I), *at_hand]


class _Flows:
    """Where gradients come from: `done` are the segments whose backward has started."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._readers = {
            name: {i for i, s in enumerate(segments) if name in s.reads and s.has_backward}
            for s in segments
            for name in s.writes
        }
        self.done: set[int] = set()

    def feeding(self, index: int) -> set[int]:
        """The segments that read what this one wrote: its gradients are theirs."""
        return {reader for name in self._segments[index].writes for reader in self._readers[name]}

    def next(self, todo: Sequence[int], under_way: set[int]) -> int:
        """Ready communication first, then compute that waits for none under way, then what is next in line."""
        ready = [i for i in todo if self.feeding(i) <= self.done]
        communication = (i for i in ready if self._segments[i].lane is Lane.COMM)
        free = (i for i in ready if not self.feeding(i) & under_way)
        return next(communication, next(free, ready[0]))


def weight_order(segments: Sequence[Segment]) -> list[Piece]:
    """All W pieces, in the order in which the backward put them aside."""
    order = backward_order(segments)
    return [piece for piece in order if piece.part is Kind.W]


def beats(order: Sequence[Piece]) -> list[list[Piece]]:
    """Cut an order after each run of communication, so that a beat begins with compute and ends with its messages.

    W pieces stay in the beat of the communication that they run under. Communication that stands first, before any
    compute, is a beat of its own.
    """
    result: list[list[Piece]] = [[]]
    for piece in order:
        communicated = any(p.lane is Lane.COMM and not p.brief for p in result[-1])
        if communicated and piece.lane is Lane.COMPUTE and piece.part is not Kind.W:
            result.append([])
        result[-1].append(piece)
    return result


def pair_order(forward: Sequence[Segment], backward: Sequence[Segment]) -> list[Paired]:
    """The pieces of a pair: the beats of the backward chunk and of the forward chunk in turn."""
    return in_turn(forward_order(forward), backward_order(backward))


def in_turn(forward: Sequence[Piece], backward: Sequence[Piece]) -> list[Paired]:
    """The beats of two orders in turn, the backward's first."""
    ours = [[(Side.FORWARD, p) for p in beat] for beat in beats(forward)]
    theirs = [[(Side.BACKWARD, p) for p in beat] for beat in beats(backward)]
    nothing: list[Paired] = []
    return [piece for turn in zip_longest(theirs, ours, fillvalue=nothing) for beat in turn for piece in beat]


def two_lanes(order: Iterable[Paired]) -> str:
    """An order as two lines of text, compute above communication; ▲ backward, △ forward as in the report."""
    lanes: dict[Lane, list[str]] = {Lane.COMPUTE: [], Lane.COMM: []}
    for side, piece in order:
        text = f"{piece}{'▲' if side is Side.BACKWARD else '△'}"
        here, there = lanes[piece.lane], lanes[Lane.COMM if piece.lane is Lane.COMPUTE else Lane.COMPUTE]
        here.append(text)
        there.append(" " * len(text))
    return "\n".join(f"{lane:8} {'  '.join(cells).rstrip()}" for lane, cells in lanes.items())
