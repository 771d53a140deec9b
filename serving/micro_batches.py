"""A step as two micro-batches, so that ranks which share experts compute while tokens travel (report 3.4.1, 3.4.2).

Attention and experts of one run under dispatch and combine of the other, layer by layer, in the order of
`model.decode.take_turns`; communications start on the lanes of training (dualpipe/lanes.py).

Every product then has half the rows, so it pays only when there are many, and when the network is slow. All ranks must
do the same in the same step: they split it when the one with the most rows has at least `ExpertSettings.overlap_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence

from model.decode import Piece


def halves(pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
    """The rows of a step in two halves, in the same order; the first has one more if their number is odd.

    A sequence whose tokens are in both goes on in the second: layer by layer, the first one's latents are there.
    """
    left = -(-sum(len(piece.tokens) for piece in pieces) // 2)
    first: list[Piece] = []
    second: list[Piece] = []
    for piece in pieces:
        taken = min(left, len(piece.tokens))
        left -= taken
        if taken:
            first.append(Piece(piece.tokens[:taken], piece.slots[: piece.past + taken]))
        if taken < len(piece.tokens):
            second.append(Piece(piece.tokens[taken:], piece.slots))
    return first, second
