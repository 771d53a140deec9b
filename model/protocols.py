"""What the model needs from outside, as small protocols: it knows no ranks and no queue implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class WeightGrads(Protocol):
    """Takes weight-gradient closures and runs them now or later (dualpipe/wgrad.py)."""

    def put(self, closure: Callable[[], None]) -> None: ...


class AtOnce:
    """A queue that puts nothing off."""

    def put(self, closure: Callable[[], None]) -> None:
        closure()


class Pending(Protocol):
    """Communication under way."""

    def wait(self) -> tuple[Any, ...]: ...


class CommOp(Protocol):
    """Communication with a hand-written backward (dualpipe/stage.py)."""

    @property
    def start(self) -> Callable[..., Pending]: ...

    @property
    def start_backward(self) -> Callable[..., Pending] | None: ...


@dataclass(frozen=True)
class Exchange:
    """The two all-to-alls of one MoE layer for one micro-batch, and the small one that tells their sizes.

    counts:   (experts_TK,) → (sizes,): what dispatch wants to know in advance; carries no gradient.
    dispatch: (x_TD, gates_TK, experts_TK, sizes) → (x_RD, gates_R, counts): one row for every (token, expert) pair
              whose expert is on this rank, sorted by expert; counts = rows per local expert.
    combine:  (y_RD,) → (y_TD,): the sum over each token's experts, back where the token lives.
    """

    counts: CommOp
    dispatch: CommOp
    combine: CommOp


class Dispatcher(Protocol):
    """Opens an exchange for each MoE layer and micro-batch."""

    def open(self) -> Exchange: ...
