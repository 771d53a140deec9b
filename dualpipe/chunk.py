"""One micro-batch on its way through one stage: runs the stage's segments forward, and later backward.

Segments can be run one at a time, so that the runtime interleaves them with those of another chunk. Each has up
to three pieces: forward `F`, backward for inputs `I`, and weight gradients `W` (from the queue). Communication
pieces only *start* here; they are waited for when a later segment reads their result, so whatever stands between
start and use runs under them. That one rule makes the overlap; everything else is the order of pieces.

Memory: a value is dropped after its last reader has run; what a backward needs is kept by the segment's own graph.
That graph begins and ends without the values themselves: a layer that keeps its input in FP8 really lets it go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph as autograd_graph
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dualpipe.lanes import HostLanes, Label, Lanes
from dualpipe.outline import Outline, outline_of
from dualpipe.overlap import MESSAGE, Piece
from dualpipe.schedule import Kind
from dualpipe.stage import Lane, Pending, Segment, inputs_of, outputs_of
from dualpipe.wgrad import WeightGradQueue


class _Entry:
    """Where one value enters a segment's graph; takes up its gradient."""

    __slots__ = ("grad",)

    def __init__(self) -> None:
        self.grad: Tensor | None = None


@dataclass(slots=True)
class _Graph:
    """What a segment keeps between forward and backward: where its inputs' gradients arrive, and where its outputs'
    gradients enter."""

    inputs: dict[str, _Entry] = field(default_factory=dict)
    outputs: dict[str, GradientEdge] = field(default_factory=dict)


# Something that asks for gradients, so that a graph begins at a value without holding it. It never gets one.
_ROOT = torch.zeros((), requires_grad=True)


class _Enter(torch.autograd.Function):
    """A value from outside, whose gradient goes to its entry."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, value: Tensor, entry: _Entry) -> Tensor:
        ctx.entry = entry
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.entry.grad = grad
        return None, None, None


# `apply` without torch.func's transforms, which it looks for at every call: no segment runs inside one.
_enter = super(torch.autograd.Function, _Enter).apply


def _exit(value: Tensor) -> GradientEdge:
    """Where the gradient of a result enters its graph.

    A node written in Python does not keep its graph alive, a view of its result does. Called with gradients on.
    """
    if isinstance(value.grad_fn, torch.autograd.function.BackwardCFunction):
        value = value.view_as(value)
    node = value.grad_fn
    return get_gradient_edge(value) if node is None else GradientEdge(node, value.output_nr)


def _run_backward(outputs: tuple[GradientEdge, ...], grads: tuple[Tensor, ...]) -> None:
    """`torch.autograd.backward`, whose own checks take as long as a small graph; the engine compares shapes too."""
    run = getattr(autograd_graph, "_engine_run_backward", None)  # torch's own name for it; not a public one
    if run is None:
        torch.autograd.backward(outputs, grads)
    else:
        run(outputs, grads, False, False, (), allow_unreachable=True, accumulate_grad=True)


class Chunk:
    """State of one (stage, micro-batch). `key` names it in the weight-gradient queue and in messages.

    `lanes` say how communication runs beside compute (`lanes.py`); `outline` is what is known of such segments.
    """

    def __init__(
        self,
        key: tuple[int, int],
        segments: Sequence[Segment],
        inputs: Sequence[Tensor],
        queue: WeightGradQueue,
        training: bool = True,
        lanes: Lanes | None = None,
        outline: Outline | None = None,
    ) -> None:
        self.key = key
        self.segments = segments
        self.outline = outline or outline_of(segments)
        self._queue = queue
        self._training = training
        self._lanes = lanes or HostLanes()
        self._values: dict[str, Any] = dict(zip(inputs_of(len(inputs)), inputs, strict=True))
        self._grads: dict[str, Tensor] = {}
        self._graphs: dict[int, _Graph] = {}
        self._pending: dict[str, tuple[int, Pending]] = {}  # value name → the forward that promised it
        self._pending_grads: dict[int, Pending] = {}  # segment → its backward under way

    def run(self, piece: Piece, send: Callable[[], object]) -> None:
        """Run a compute piece or start a communication piece; `send` hands over the chunk's result."""
        if piece.index == MESSAGE:
            send()
        elif piece.part is Kind.F:
            self.forward(piece.index)
        elif piece.part is Kind.I:
            self.backward(piece.index)
        else:
            self.weights(piece.index)

    # -- forward -----------------------------------------------------------------------------------------------

    def forward(self, index: int) -> None:
        """Run segment `index`, or start it if it communicates."""
        segment = self.segments[index]
        values = {name: self._read(name) for name in segment.reads}
        if segment.lane is Lane.COMM:
            pending = self._start((segment.name, "F", self.key), segment.work.start, values.values())  # type: ignore[union-attr]
            self._pending.update(dict.fromkeys(segment.writes, (index, pending)))
        else:
            self._lanes.compute((segment.name, "F", self.key), self._compute, index, segment, values)
        for name in segment.reads:
            if self.outline.last_reader[name] == index:
                self._values.pop(name, None)

    def _compute(self, index: int, segment: Segment, values: dict[str, Any]) -> None:
        graph = _Graph()
        with torch.set_grad_enabled(self._training):
            if self._training:
                for name, value in values.items():
                    if _differentiable(value):
                        entry = graph.inputs[name] = _Entry()
                        values[name] = _enter(_ROOT, value, entry)
            results = segment.work(*values.values())  # type: ignore[operator]
            results = results if isinstance(results, tuple) else (results,)
            for name, value in zip(segment.writes, results, strict=True):
                if self._training and isinstance(value, Tensor) and value.requires_grad:
                    graph.outputs[name] = _exit(value)
                    value = value.detach()
                self._values[name] = value
        if self._training:
            self._graphs[index] = graph

    def _start(self, label: Label, begin: Callable[..., Pending], arguments: Iterable[Any]) -> Pending:
        arguments = tuple(arguments)

        def run() -> Pending:
            with torch.no_grad():
                return begin(*arguments)

        return self._lanes.start(label, run)

    def _read(self, name: str) -> Any:
        if name in self._pending:
            index, pending = self._pending[name]
            results = pending.wait()
            for written, value in zip(self.segments[index].writes, results, strict=True):
                self._values[written] = value
                del self._pending[written]
        return self._values[name]

    def outputs(self) -> tuple[Tensor, ...]:
        """The stage's results, taken out of the chunk; waits for them if they are still under way."""
        values = tuple(map(self._read, self.outline.outputs))
        for name in self.outline.outputs:
            del self._values[name]
        return values

    # -- backward ----------------------------------------------------------------------------------------------

    def seed(self, grads: Sequence[Tensor | None]) -> None:
        """The gradients of `out0`…; the loss of a last stage is seeded with one."""
        for name, grad in zip(outputs_of(len(grads)), grads, strict=True):
            self._add_grad(name, grad)

    def backward(self, index: int) -> None:
        """Gradients of the inputs of segment `index` (or start them); weight gradients go to the queue."""
        segment = self.segments[index]
        if self._pending_grads:
            self._settle(index)
        if segment.lane is Lane.COMM:
            grads = [self._grads.pop(name, None) for name in segment.writes]
            begin: Any = segment.work.start_backward  # type: ignore[union-attr]
            self._pending_grads[index] = self._start((segment.name, "I", self.key), begin, grads)
            return
        self._lanes.compute((segment.name, "I", self.key), self._compute_inputs, index)

    def _compute_inputs(self, index: int) -> None:
        graph = self._graphs.pop(index)
        reached = [name for name in graph.outputs if name in self._grads]
        if not reached:
            return
        ends = tuple(map(graph.outputs.__getitem__, reached))
        grads = tuple(map(self._grads.pop, reached))
        with self._queue.record((*self.key, index)):
            _run_backward(ends, grads)
        for name, entry in graph.inputs.items():
            self._add_grad(name, entry.grad)

    def weights(self, index: int) -> None:
        """The weight gradients of segment `index`."""
        self._lanes.compute((self.segments[index].name, "W", self.key), self._queue.run, (*self.key, index))

    def input_grads(self, count: int) -> tuple[Tensor | None, ...]:
        """The gradients of `in0`…, once every segment's backward has run; None where nothing depends on the input."""
        for index in tuple(self._pending_grads):
            self._finish(index)
        return tuple([self._grads.pop(name, None) for name in inputs_of(count)])

    def _settle(self, index: int) -> None:
        """Finish the backwards that contribute to the gradients of what segment `index` wrote."""
        wanted = set(self.segments[index].writes)
        for later in tuple(self._pending_grads):
            if wanted & set(self.segments[later].reads):
                self._finish(later)

    def _finish(self, index: int) -> None:
        grads = self._pending_grads.pop(index).wait()
        for name, grad in zip(self.segments[index].reads, grads, strict=True):
            self._add_grad(name, grad)

    def _add_grad(self, name: str, grad: Tensor | None) -> None:
        if grad is not None:
            known = self._grads.get(name)
            self._grads[name] = grad if known is None else known + grad


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
