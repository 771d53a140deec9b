"""What the segments of a stage settle once for all its micro-batches: the orders of their pieces, who reads what last.

Segments are made anew for every micro-batch, since their work closes over its tokens. Their names, lanes, reads and
writes are the same every time, and all that follows from those is found once and looked up afterwards: a runtime has a
few hundred actions per step, and whatever it does between two of them the device waits for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dualpipe.overlap import Paired, Piece, backward_order, forward_order, in_turn, weight_order
from dualpipe.stage import Segment, outputs_of


@dataclass(frozen=True, eq=False)
class Outline:
    """One stage's segments without their work.

    forward, backward, inputs, weights   the pieces of F, B, I and W, in the order in which they run
    outputs                              the names of the stage's results
    last_reader[name]                    the last segment that reads a value
    """

    forward: tuple[Piece, ...]
    backward: tuple[Piece, ...]
    inputs: tuple[Piece, ...]
    weights: tuple[Piece, ...]
    outputs: tuple[str, ...]
    last_reader: Mapping[str, int]


def outline_of(segments: Sequence[Segment]) -> Outline:
    written = {name for segment in segments for name in segment.writes}
    return Outline(
        forward=tuple(forward_order(segments)),
        backward=tuple(backward_order(segments)),
        inputs=tuple(backward_order(segments, weights=False)),
        weights=tuple(weight_order(segments)),
        outputs=tuple(name for name in outputs_of(len(written)) if name in written),
        last_reader={name: index for index, segment in enumerate(segments) for name in segment.reads},
    )


class Outlines:
    """The outlines that have been found, and the orders of their pairs."""

    def __init__(self) -> None:
        self._outlines: dict[tuple[object, ...], Outline] = {}
        self._pairs: dict[tuple[Outline, Outline], list[Paired]] = {}

    def of(self, segments: Sequence[Segment]) -> Outline:
        key = tuple([(s.name, s.lane, s.reads, s.writes, s.has_backward) for s in segments])
        found = self._outlines.get(key)
        if found is None:
            found = self._outlines[key] = outline_of(segments)
        return found

    def pair(self, forward: Outline, backward: Outline) -> list[Paired]:
        """The pieces of a forward and a backward that run at once."""
        found = self._pairs.get((forward, backward))
        if found is None:
            found = self._pairs[forward, backward] = in_turn(forward.forward, backward.backward)
        return found
