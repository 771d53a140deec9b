"""Schedules in tokens: a rate as a pure function of how many tokens the run has trained on (report 4.2).

A schedule is a list of pieces, one after the other; the last one's value holds from its end on:

    [Piece(2e9, 0, 2.2e-4, "linear"), Piece(10e12, 2.2e-4), Piece(4.3e12, 2.2e-4, 2.2e-5, "cosine")]

Counting tokens and not steps keeps a recipe the same when the batch size changes or ramps up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SHAPES = ("linear", "cosine")


@dataclass
class Piece:
    """From `start` to `end` over the given number of tokens; `end` left out means constant.

    shape   how it goes there: linear, or half a cosine (flat at both ends)
    """

    tokens: float = math.inf
    start: float = 0.0
    end: float | None = None
    shape: str = "linear"

    def value(self, tokens: float) -> float:
        """The value after `tokens` tokens of this piece."""
        if self.end is None or tokens <= 0:
            return self.start
        if tokens >= self.tokens:
            return self.end
        progress = tokens / self.tokens
        if self.shape == "cosine":
            progress = 0.5 * (1 - math.cos(math.pi * progress))
        return self.start + (self.end - self.start) * progress


def value_at(pieces: Sequence[Piece], tokens: float) -> float:
    """The schedule's value after `tokens` tokens. At a border the later piece rules. Raises ValueError if empty."""
    if not pieces:
        raise ValueError("a schedule needs at least one piece")
    for piece in pieces[:-1]:
        if tokens < piece.tokens:
            return piece.value(tokens)
        tokens -= piece.tokens
    return pieces[-1].value(tokens)


def check_pieces(name: str, pieces: Sequence[Piece], least: float = 0.0) -> None:
    """Raise ValueError, naming the override, unless every piece is sound and all values are at least `least`."""
    for index, piece in enumerate(pieces):
        label = f"{name}[{index}]"
        if not piece.tokens > 0:
            raise ValueError(f"{label}.tokens={piece.tokens} must be positive")
        if piece.shape not in SHAPES:
            raise ValueError(f"{label}.shape={piece.shape!r} is unknown; choose one of {', '.join(SHAPES)}")
        if index < len(pieces) - 1 and math.isinf(piece.tokens):
            raise ValueError(f"{label}.tokens is infinite, so the piece after it never begins; give it a length")
        if piece.end is not None and math.isinf(piece.tokens):
            raise ValueError(f"{label} has an end and no length: set {label}.tokens, or leave out {label}.end")
        for key, value in (("start", piece.start), ("end", piece.start if piece.end is None else piece.end)):
            if not least <= value < math.inf:
                raise ValueError(f"{label}.{key}={value} must be {least} or more")
