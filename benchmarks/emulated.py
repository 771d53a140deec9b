"""A stage of MoE layers whose compute is timed sleeps and whose communication is real: for measuring overlap alone.

Sleeping leaves the cores free, so four ranks on two cores behave like four devices. The tokens are real: every
dispatch and combine sends the bytes that a layer of this shape sends, through the project's own dispatcher. Costs per
layer are in the proportions of a DeepSeek-V3 layer: attention and experts weigh about the same, the shared expert a
fifth of that; the backward for inputs and the weight gradients each cost as much as the forward.

The same layers serve as plain modules for torch.distributed.pipelining (`EmulatedModule`): there communication is an
autograd function that waits at once, and the sleep of W hangs on the path to a parameter, so that torch's own split of
I and W pays it in W alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dualpipe.stage import Segment, TensorSpec, communicate, compute
from dualpipe.wgrad import WeightGradQueue
from model.protocols import Dispatcher


@dataclass(frozen=True)
class Shape:
    """tokens T, hidden size D, experts and how many a token chooses, MoE layers per stage; seconds per unit of cost."""

    tokens: int = 1024
    hidden: int = 512
    experts: int = 8
    chosen: int = 4
    layers: int = 4
    unit: float = 0.020

    ATTENTION, SHARED, EXPERTS = 1.0, 0.2, 1.0  # units of F; I and W cost the same

    def routes(self, layer: int) -> tuple[Tensor, Tensor]:
        """experts_TK and gates_TK: a random choice, the same every time."""
        generator = torch.Generator().manual_seed(layer)
        order = torch.rand(self.tokens, self.experts, generator=generator).argsort(1)
        return order[:, : self.chosen], torch.full((self.tokens, self.chosen), 1 / self.chosen)


class _Sleep(torch.autograd.Function):
    """The identity that takes `seconds` forward and `seconds` backward; then hands W's sleep to the queue."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, queue: WeightGradQueue | None) -> Tensor:
        ctx.seconds, ctx.queue = seconds, queue
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        time.sleep(ctx.seconds)
        if ctx.queue is not None:
            ctx.queue.put(lambda: time.sleep(ctx.seconds))
        return dy, None, None


class EmulatedStage:
    """Implements the engine's Stage: `shape.layers` MoE layers; the last stage's loss is the sum of what comes out."""

    def __init__(self, shape: Shape, dispatcher: Dispatcher, queue: WeightGradQueue, first: bool, last: bool) -> None:
        self.shape, self.dispatcher, self.queue, self.first, self.last = shape, dispatcher, queue, first, last
        self.routes = [shape.routes(layer) for layer in range(shape.layers)]

    def input_spec(self, micro_batch: Any) -> tuple[TensorSpec, ...]:
        return () if self.first else self._spec()

    def output_spec(self, micro_batch: Any) -> tuple[TensorSpec, ...]:
        return () if self.last else self._spec()

    def _spec(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec((self.shape.tokens, self.shape.hidden), torch.float32),)

    def segments(self, micro_batch: Any) -> Sequence[Segment]:
        segments: list[Segment] = []
        residual: tuple[str, ...] = ("in0",)
        if self.first:
            segments.append(compute("input", (), ("input",), lambda: micro_batch))
            residual = ("input",)
        for layer in range(self.shape.layers):
            residual = self._write(segments, layer, residual)
        end: Callable[..., Tensor] = (lambda *parts: sum(parts).sum()) if self.last else (lambda *parts: sum(parts))  # type: ignore[union-attr, return-value]
        return [*segments, compute("output", residual, ("out0",), end)]

    def _write(self, out: list[Segment], layer: int, residual: tuple[str, ...]) -> tuple[str, ...]:
        h, x, gates, chosen, sizes, rows, row_gates, counts, weighted, shared, y = (
            f"{layer}.{name}"
            for name in ["h", "x", "gates", "chosen", "sizes", "rows", "row_gates", "counts", "weighted", "shared", "y"]
        )
        experts_TK, gates_TK = self.routes[layer]

        def attend(*parts: Tensor) -> tuple[Tensor, ...]:
            h = sum(parts[1:], parts[0])
            return h, self._sleep(h, self.shape.ATTENTION), gates_TK, experts_TK

        exchange = self.dispatcher.open()
        out.append(compute(f"{layer}.attention", residual, (h, x, gates, chosen), attend))
        out.append(communicate(f"{layer}.counts", (chosen,), (sizes,), exchange.counts))
        reads, writes = (x, gates, chosen, sizes), (rows, row_gates, counts)
        out.append(communicate(f"{layer}.dispatch", reads, writes, exchange.dispatch))
        out.append(compute(f"{layer}.shared", (x,), (shared,), lambda x: self._sleep(x, self.shape.SHARED)))
        out.append(compute(f"{layer}.experts", writes, (weighted,), self._experts))
        out.append(communicate(f"{layer}.combine", (weighted,), (y,), exchange.combine))
        return h, shared, y

    def _experts(self, rows: Tensor, row_gates: Tensor, counts: list[int]) -> Tensor:
        return self._sleep(rows * row_gates.unsqueeze(1), self.shape.EXPERTS)

    def _sleep(self, x: Tensor, units: float) -> Tensor:
        return _Sleep.apply(x, units * self.shape.unit, self.queue)


class EmulatedModule(nn.Module):
    """The same stage for torch.distributed.pipelining: segments one after the other, under ordinary autograd."""

    def __init__(self, shape: Shape, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.shape, self.dispatcher = shape, dispatcher
        self.routes = [shape.routes(layer) for layer in range(shape.layers)]
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(3 * shape.layers))

    def forward(self, h: Tensor) -> Tensor:
        for layer in range(self.shape.layers):
            experts_TK, gates_TK = self.routes[layer]
            attention, shared, experts = self.weights[3 * layer : 3 * layer + 3]
            x = self._sleep(h, self.shape.ATTENTION, attention)
            exchange = self.dispatcher.open()
            (sizes,) = exchange.counts.start(experts_TK).wait()
            rows, row_gates = _Communicate.apply(exchange.dispatch, (experts_TK, sizes), x, gates_TK)
            s = self._sleep(x, self.shape.SHARED, shared)
            weighted = self._sleep(rows * row_gates.unsqueeze(1), self.shape.EXPERTS, experts)
            (y,) = _Communicate.apply(exchange.combine, (), weighted)
            h = h + s + y
        return h

    def _sleep(self, x: Tensor, units: float, weight: Tensor) -> Tensor:
        seconds = units * self.shape.unit
        return _Sleep.apply(x, seconds, None) + _SleepW.apply(weight, seconds)


class _SleepW(torch.autograd.Function):
    """Nothing forward; backward, on the way to a weight, `seconds`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return dy, None


class _Communicate(torch.autograd.Function):
    """A communication segment as an autograd function: waited for at once, forward and backward."""

    @staticmethod
    def forward(ctx: Any, op: Any, constants: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op, ctx.count = op, len(tensors)
        return tuple(r for r in op.start(*tensors, *constants).wait() if isinstance(r, Tensor))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        written = (*grads, None) if ctx.count > 1 else grads  # dispatch also writes counts, which have no gradient
        return (None, None, *ctx.op.start_backward(*written).wait()[: ctx.count])
