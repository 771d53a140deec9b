"""What the engine asks of a stage: the shapes that it receives, and its work cut into segments.

A *segment* is a stretch of a stage that is all compute or all communication. Segments pass named values to each
other; every one has its own small autograd graph (its inputs are detached), so the runtime may put anything
between two of them: a segment of another micro-batch, a message, a weight gradient.

    compute   y = fn(x, ...)                 ordinary torch code under autograd
    comm      start(x, ...) → wait() → y     an asynchronous collective, and another one for the gradients

A stage that has nothing to communicate is one compute segment: see `ModuleStage`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Lane(StrEnum):
    COMPUTE = "compute"
    COMM = "comm"


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that a message carries."""

    shape: tuple[int, ...]
    dtype: torch.dtype


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


@dataclass(frozen=True)
class Segment:
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


def inputs_of(count: int) -> tuple[str, ...]:
    """The names under which a stage's first segments find what came from the previous stage."""
    return tuple(f"in{i}" for i in range(count))


def outputs_of(count: int) -> tuple[str, ...]:
    """The names under which a stage leaves what goes to the next one; the last stage leaves its loss in `out0`."""
    return tuple(f"out{i}" for i in range(count))


class Stage(Protocol):
    """A slice of the model, as the engine sees it."""

    def input_spec(self, micro_batch: Any) -> tuple[TensorSpec, ...]:
        """What arrives from the previous stage for this micro-batch; () on the first stage."""
        ...

    def output_spec(self, micro_batch: Any) -> tuple[TensorSpec, ...]:
        """What leaves for the next stage; gradients of the same shapes come back. () on the last stage."""
        ...

    def segments(self, micro_batch: Any) -> Sequence[Segment]:
        """The work on one micro-batch, in forward order; reads `in0`…, writes `out0`…"""
        ...


class ModuleStage:
    """Any torch module as a stage of one segment.

    The module is called with the tensors from the previous stage (the first stage: with `inputs(micro_batch)`), and
    the last stage's result goes through `loss(output, micro_batch)`. Weight gradients that the module does not hand
    to a queue are computed in I, and W is then empty.
    """

    def __init__(
        self,
        module: nn.Module,
        input_spec: tuple[TensorSpec, ...] = (),
        output_spec: tuple[TensorSpec, ...] = (),
        inputs: Callable[[Any], Tensor | tuple[Tensor, ...]] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self.module = module
        self._input_spec = input_spec
        self._output_spec = output_spec
        self._inputs = inputs
        self._loss = loss

    def input_spec(self, micro_batch: Any) -> tuple[TensorSpec, ...]:
        return self._input_spec

    def output_spec(self, micro_batch: Any) -> tuple[TensorSpec, ...]:
        return self._output_spec

    def segments(self, micro_batch: Any) -> Sequence[Segment]:
        def run(*received: Tensor) -> Any:
            inputs: Any = received
            if self._inputs is not None:
                inputs = self._inputs(micro_batch)
                inputs = inputs if isinstance(inputs, tuple) else (inputs,)
            result = self.module(*inputs)
            return result if self._loss is None else self._loss(result, micro_batch)

        reads = inputs_of(len(self._input_spec))
        writes = outputs_of(len(self._output_spec) if self._loss is None else 1)
        return (compute("module", reads, writes, run),)
