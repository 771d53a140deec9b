"""In which order do the pieces of a chunk, or of two chunks at once, run?

A piece is one part of one segment: F (forward), I (backward for inputs) or W (weight gradients). A communication
piece only starts here and is waited for where its result is read (see `chunk.py`), so everything between start and
use hides it. For two MoE layers the order below is the report's Fig. 4, ▲ backward and △ forward:

    compute  MLP(B)▲  MLP(W)▲  MLP(F)△   ATTN(B)▲  ATTN(W)▲  ATTN(F)△
    comm     DISPATCH(F)△  DISPATCH(B)▲  COMBINE(F)△  P2P  COMBINE(B)▲

The rule behind it: cut both chunks into beats, each a run of compute pieces and the communication that they make
possible, and alternate the beats. While one chunk's communication is under way, the other one computes. The rule
does not ask for equal layers: a dense layer is a beat without communication, and the longer chunk's tail runs on
alone.

The order depends on the segments only, so it is data: printable, comparable, the same with overlap on and off as
far as each single chunk is concerned. That is why gradients are bit-equal either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from dualpipe.chunk import Chunk
from dualpipe.schedule import Kind
from dualpipe.stage import Lane, Segment


@dataclass(frozen=True)
class Piece:
    """One part (F, I or W) of segment `index`, called `name`."""

    part: Kind
    index: int
    name: str
    lane: Lane

    def __str__(self) -> str:
        return f"{self.name}({self.part.value})"


def forward_order(segments: Sequence[Segment]) -> list[Piece]:
    return [Piece(Kind.F, i, s.name, s.lane) for i, s in enumerate(segments)]


def backward_order(segments: Sequence[Segment], weights: bool = True) -> list[Piece]:
    """Segments from last to first; communication starts as soon as its gradients are there, and W runs under it.

    With `weights=False` the W pieces are left out: the schedule runs them later (`weight_order`).
    """
    readers = {name: {i for i, s in enumerate(segments) if name in s.reads} for s in segments for name in s.writes}
    todo = list(range(len(segments) - 1, -1, -1))
    done: set[int] = set()
    order: list[Piece] = []
    waiting: list[Piece] = []  # W pieces that may run under the next communication

    def ready(index: int) -> bool:
        return all(readers[name] <= done for name in segments[index].writes)

    while todo:
        index = next((i for i in todo if segments[i].lane is Lane.COMM and ready(i)), todo[0])
        todo.remove(index)
        done.add(index)
        segment = segments[index]
        if segment.lane is Lane.COMPUTE:
            order += waiting
            waiting = [Piece(Kind.W, index, segment.name, Lane.COMPUTE)] if weights else []
        order.append(Piece(Kind.I, index, segment.name, segment.lane))
    return order + waiting


def weight_order(segments: Sequence[Segment]) -> list[Piece]:
    """All W pieces, in the order in which the backward put them aside."""
    compute = [(i, s) for i, s in enumerate(segments) if s.lane is Lane.COMPUTE]
    return [Piece(Kind.W, i, s.name, Lane.COMPUTE) for i, s in reversed(compute)]


def beats(order: Sequence[Piece]) -> list[list[Piece]]:
    """Cut an order after each run of communication, so that a beat begins with compute and ends with its messages.

    W pieces stay in the beat of the communication that they run under. Communication that stands first, before any
    compute, is a beat of its own.
    """
    result: list[list[Piece]] = [[]]
    for piece in order:
        communicated = any(p.lane is Lane.COMM for p in result[-1])
        if communicated and piece.lane is Lane.COMPUTE and piece.part is not Kind.W:
            result.append([])
        result[-1].append(piece)
    return result


def pair_order(forward: Sequence[Segment], backward: Sequence[Segment]) -> list[tuple[int, Piece]]:
    """The pieces of a pair, as (0 = forward chunk, 1 = backward chunk; piece)."""
    ours = [[(0, p) for p in beat] for beat in beats(forward_order(forward))]
    theirs = [[(1, p) for p in beat] for beat in beats(backward_order(backward))]
    if theirs[0][0][1].lane is Lane.COMM:  # a backward that opens with its combine: start it before all else
        first, *theirs = theirs
        return first + list(chain.from_iterable(chain.from_iterable(zip_longest(ours, theirs, fillvalue=[]))))
    return list(chain.from_iterable(chain.from_iterable(zip_longest(ours, theirs, fillvalue=[]))))


def run_piece(chunk: Chunk, piece: Piece) -> None:
    if piece.part is Kind.F:
        chunk.forward(piece.index)
    elif piece.part is Kind.I:
        chunk.backward(piece.index)
    else:
        chunk.weights(piece.index)
