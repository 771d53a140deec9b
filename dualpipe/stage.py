"""What the engine asks of a stage: the shapes that it receives, and its work cut into segments.

A *segment* is a stretch of a stage that is all compute or all communication. Segments pass named values to each
other; every one has its own small autograd graph (its inputs are detached), so the runtime may put anything
between two of them: a segment of another micro-batch, a message, a weight gradient.

    compute   y = fn(x, ...)                 ordinary torch code under autograd
    comm      start(x, ...) → wait() → y     an asynchronous collective, and another one for the gradients

A stage that has nothing to communicate is one compute segment: see `pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Lane(StrEnum):
    COMPUTE = "compute"
    COMM = "comm"


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that a message carries."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient of the same shape comes back: integers and booleans have none."""
        return self.dtype.is_floating_point or self.dtype.is_complex


class Pending(Protocol):
    """An operation under way. `wait` returns its results, and may be called once."""

    def wait(self) -> tuple[Tensor, ...]: ...


class CommOp(Protocol):
    """Communication with a hand-written backward: gradients travel the opposite way.

    `start` receives the values that the segment reads and promises those that it writes; `start_backward` receives
    the gradients of the written values and promises those of the read tensors that need one (None for the rest); it
    is None where no gradient flows. One object serves one micro-batch, so it may keep what the backward needs
    (counts, permutations).
    """

    @property
    def start(self) -> Callable[..., Pending]: ...

    @property
    def start_backward(self) -> Callable[..., Pending] | None: ...


class Segment(NamedTuple):
    """name (unique in its stage), lane, the values that it reads and writes, and its work."""

    name: str
    lane: Lane
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    work: Callable[..., Any] | CommOp

    @property
    def has_backward(self) -> bool:
        """False for communication that carries no gradient, such as an exchange of counts."""
        return self.lane is Lane.COMPUTE or self.work.start_backward is not None  # type: ignore[union-attr]


def compute(name: str, reads: Sequence[str], writes: Sequence[str], fn: Callable[..., Any]) -> Segment:
    """A compute segment: `fn(*read values)` returns one value or a tuple of them, as many as `writes`."""
    return Segment(name, Lane.COMPUTE, tuple(reads), tuple(writes), fn)


def communicate(name: str, reads: Sequence[str], writes: Sequence[str], op: CommOp) -> Segment:
    return Segment(name, Lane.COMM, tuple(reads), tuple(writes), op)


@cache
def inputs_of(count: int) -> tuple[str, ...]:
    """The names under which a stage's first segments find what came from the previous stage."""
    return tuple(f"in{i}" for i in range(count))


@cache
def outputs_of(count: int) -> tuple[str, ...]:
    """The names under which a stage leaves what goes to the next one; the last stage leaves its loss in `out0`."""
    return tuple(f"out{i}" for i in range(count))


class Stage(Protocol):
    """A slice of the model, as the engine sees it."""

    def input_spec(self, micro_batch: Any) -> tuple[TensorSpec, ...]:
        """What arrives from the previous stage for this micro-batch; () on the first stage."""
        ...

    def output_spec(self, micro_batch: Any) -> tuple[TensorSpec, ...]:
        """What leaves for the next stage; gradients of the floating ones come back. () on the last stage."""
        ...

    def segments(self, micro_batch: Any) -> Sequence[Segment]:
        """The work on one micro-batch, in forward order; reads `in0`…, writes `out0`…"""
        ...
