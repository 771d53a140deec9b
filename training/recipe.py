"""Schedules in tokens: a rate as a pure function of how many tokens the run has trained on (report 4.2).

A schedule is a list of pieces, one after the other; the last one's value holds from its end on:

    [Piece(2e9, 0, 2.2e-4, "linear"), Piece(10e12, 2.2e-4), Piece(4.3e12, 2.2e-4, 2.2e-5, "cosine")]

Counting tokens and not steps keeps a recipe the same when the batch size changes or ramps up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

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


@dataclass
class RecipeConfig:
    """What changes in the course of a run. The clock is the number of tokens trained on, divided by `token_scale`.

    batch_*   the global batch grows from `batch_start` sequences in steps of `batch_increment` to its full size, which
              it reaches after `batch_tokens` (report 4.2: 3,072 to 15,360 over the first 469B)
    """

    lr: list[Piece] = field(default_factory=list)  # the learning rate itself; [] = by optim.lr, optim.warmup_steps, …
    mtp_weight: list[Piece] = field(default_factory=list)  # factors on loss.mtp_weight; [] = always 1
    batch_start: int = 0  # 0 = the full batch from the start
    batch_increment: int = 0
    batch_tokens: float = 0.0
    token_scale: float = 1.0  # e.g. 1e-6: one token of this run stands for a million of the recipe

    def check(self) -> None:
        """Raise ValueError, naming the override, for schedules that make no sense."""
        check_pieces("recipe.lr", self.lr)
        check_pieces("recipe.mtp_weight", self.mtp_weight)
        if not 0 < self.token_scale < math.inf:
            raise ValueError(f"recipe.token_scale={self.token_scale} must be positive")
        if self.batch_start:
            for name in ("batch_start", "batch_increment", "batch_tokens"):
                if not 0 < getattr(self, name) < math.inf:
                    raise ValueError(f"recipe.{name}={getattr(self, name)} must be positive for the batch to grow")


def factor_at(pieces: Sequence[Piece], tokens: float) -> float:
    """The value of a schedule of factors; without any piece 1."""
    return value_at(pieces, tokens) if pieces else 1.0


def batch_at(recipe: RecipeConfig, tokens: float, full: int) -> int:
    """Sequences in the step that begins after `tokens` tokens; `full` is the final size.

    The sizes batch_start, batch_start + batch_increment, … full share the tokens of the ramp out evenly among them.
    """
    if not recipe.batch_start or tokens >= recipe.batch_tokens:
        return full
    sizes = len(range(recipe.batch_start, full, recipe.batch_increment))
    return recipe.batch_start + recipe.batch_increment * int(tokens / recipe.batch_tokens * sizes)


def check_ramp(recipe: RecipeConfig, full: int, unit: int) -> list[int]:
    """The numbers of micro-batches per pipeline that the ramp goes through.

    unit   sequences of one micro-batch in all pipelines. Raises ValueError, naming the override, if a size of the
           ramp is not a multiple of it.
    """
    if not recipe.batch_start:
        return []
    if recipe.batch_start >= full:
        raise ValueError(f"recipe.batch_start={recipe.batch_start} must be below the full batch of {full} sequences")
    for name in ("batch_start", "batch_increment"):
        if getattr(recipe, name) % unit:
            raise ValueError(
                f"recipe.{name}={getattr(recipe, name)} must be a multiple of {unit}, the sequences of one micro-batch "
                f"in all pipelines (data.micro_batch_size × data-parallel ranks)"
            )
    return [size // unit for size in range(recipe.batch_start, full, recipe.batch_increment)]
