"""What one micro-batch keeps and computes in one stage, found by running the stage's own code on torch's meta device.

There a tensor has a shape and no data, so a stage of any size runs in a second on a laptop, and what counts is the code
itself: which tensors autograd keeps, what recomputation makes again, which products a backward needs. Every storage
is noted when it is made and when it goes. Floating-point operations are torch's own count of matrix products and of
the attention core, of which a causal kernel does half.

What cannot run without data is where tokens go. `PaperDispatcher` stands in for the exchange: every expert of the
layer gets the same number of rows, and the buffers are as large as those of `dispatch.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from dualpipe.chunk import Chunk
from dualpipe.overlap import Piece, backward_order, forward_order, weight_order
from dualpipe.schedule import Kind, Step, parts
from dualpipe.wgrad import WeightGradQueue
from model.batch import MicroBatch
from model.protocols import Exchange
from model.stage import ModelStage
from parallel.dispatch import Promise
from parallel.packing import Columns

ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_backward,
)
TOKENS = ("tokens_BS", "targets_BS", "documents_BS", "positions_BS")
SHORT = 64


@dataclass(frozen=True)
class Phase:
    """One of F, I and W: bytes that exist at most and at its end, above what was there before F; operations."""

    peak: int
    kept: int
    flops: float


@dataclass(frozen=True)
class Rehearsal:
    """One micro-batch in one stage: F, then either I and W or the whole backward B."""

    forward: Phase
    inputs: Phase
    weights: Phase
    backward: Phase


class Accountant(TorchDispatchMode):
    """Counts the bytes of all storages made under it that still exist, and floating-point operations."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.flops = 0.0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_iter(results):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        packet = func._overloadpacket
        if packet in flop_registry:
            count = flop_registry[packet](*args, **(kwargs or {}), out_val=results)
            self.flops += count / 2 if packet in ATTENTION else count
        return results

    def restart(self) -> None:
        """Measure peak and operations from here."""
        self.peak, self.flops = self.live, 0.0

    def _note(self, storage: torch.UntypedStorage) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number not in self._known:
            self.live += size
            self.peak = max(self.peak, self.live)
            self._known[number] = weakref.finalize(storage, self._forget, number, size)

    def _forget(self, number: int, size: int) -> None:
        self.live -= size
        del self._known[number]


def rehearse(stage: ModelStage, micro_batch: MicroBatch, queue: WeightGradQueue) -> Rehearsal:
    """Run one micro-batch. `stage` and the micro-batch may be on the meta device; `queue` is the stage's own."""
    with Accountant() as accountant:
        first = replace(micro_batch, **{name: getattr(micro_batch, name)[:1, :SHORT] for name in TOKENS})
        _run(stage, first, queue, accountant, split=True)  # makes what outlives it, such as copies of weights
        forward, inputs, weights = _run(stage, micro_batch, queue, accountant, split=True)
        _, backward = _run(stage, micro_batch, queue, accountant, split=False)
        return Rehearsal(forward, inputs, weights, backward)


def _run(
    stage: ModelStage, micro_batch: MicroBatch, queue: WeightGradQueue, accountant: Accountant, split: bool
) -> list[Phase]:
    began = accountant.live
    phases: list[Phase] = []

    def run(chunk: Chunk, order: Sequence[Piece], send: Callable[[], object]) -> None:
        for piece in order:
            chunk.run(piece, send)
        phases.append(Phase(accountant.peak - began, accountant.live - began, accountant.flops))
        accountant.restart()

    accountant.restart()
    device = micro_batch.tokens_BS.device
    with torch.no_grad():  # chunks switch gradients on where they build their graphs
        received = [torch.empty(s.shape, dtype=s.dtype, device=device) for s in stage.input_spec(micro_batch)]
        chunk = Chunk((0, 0), stage.segments(micro_batch), received, queue)
        received.clear()
        shapes: list[tuple[torch.Size, torch.dtype]] = []
        run(chunk, forward_order(chunk.segments), lambda: shapes.extend((o.shape, o.dtype) for o in chunk.outputs()))
        chunk.seed([torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes])
        inputs = len(stage.input_spec(micro_batch))
        run(chunk, backward_order(chunk.segments, weights=not split), lambda: chunk.input_grads(inputs))
        if split:
            run(chunk, weight_order(chunk.segments), lambda: None)
    return phases


def peak_bytes(row: Iterable[Step], stages: Mapping[int, Rehearsal]) -> int:
    """The most that the activations of a rank take while it runs its row of a schedule.

    The two chunks of a pair are taken to reach their peaks together.
    """
    live = peak = 0
    for step in row:
        before, reached = live, live
        for action in parts(step):
            known = stages[action.stage]
            begin, phase, end = {
                Kind.F: (0, known.forward, known.forward.kept),
                Kind.B: (known.forward.kept, known.backward, 0),
                Kind.I: (known.forward.kept, known.inputs, known.inputs.kept),
                Kind.W: (known.inputs.kept, known.weights, 0),
            }[action.kind]
            reached += phase.peak - begin
            live += end - begin
        peak = max(peak, reached, before)
    return peak


@dataclass(frozen=True)
class PaperDispatcher:
    """Shapes of an exchange in which all experts of a layer get the same; on any device.

    share    experts on this rank
    visited  ranks of the EP group that hold an expert of a token, on average
    """

    share: int
    visited: float

    def open(self) -> Exchange:
        dispatch = _Dispatch(self)
        return Exchange(_Counts(), dispatch, _Combine(dispatch))


class _Counts:
    start_backward = None

    def start(self, experts_TK: Tensor) -> Promise:
        return Promise(lambda: (experts_TK.new_empty(0),))


class _Dispatch:
    """T tokens become R rows; M of them are received, and as many sent."""

    def __init__(self, dispatcher: PaperDispatcher) -> None:
        self._dispatcher = dispatcher
        self._kept: list[Tensor] = []
        self.T = self.M = self.R = self.K = 0

    def start(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor, _: Tensor) -> Promise:
        self.T, self.K = experts_TK.shape
        self.M, self.R = round(self.T * self._dispatcher.visited), self.T * self.K
        moving = self.travel((x_TD, gates_TK, experts_TK.to(torch.int32)))

        def finish() -> tuple[Any, ...]:
            moving.clear()  # really, what arrived goes as soon as the rows are made of it
            self._kept = [experts_TK.new_empty(number) for number in (self.M, self.R, self.R)]  # of Hop and Route
            each, more = divmod(self.R, self._dispatcher.share)
            counts = [each + (expert < more) for expert in range(self._dispatcher.share)]
            return x_TD.new_empty(self.R, x_TD.shape[1]), gates_TK.new_empty(self.R), counts

        return Promise(finish)

    def start_backward(self, dx_RD: Tensor, dgates_R: Tensor, _: None) -> Promise:
        moving = self.travel((dx_RD.new_empty(0, dx_RD.shape[1]), dgates_R.new_empty(0, self.K)))

        def finish() -> tuple[Any, ...]:
            moving.clear()
            return dx_RD.new_empty(self.T, dx_RD.shape[1]), dgates_R.new_empty(self.T, self.K), None, None

        return Promise(finish)

    def travel(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """What is sent and what arrives, while it does."""
        layout = Columns.of(columns)
        return [layout.block(self.M, columns[0].device) for _ in range(2)]


class _Combine:
    def __init__(self, dispatch: _Dispatch) -> None:
        self._dispatch = dispatch

    def start(self, y_RD: Tensor) -> Promise:
        return self._exchange(y_RD, self._dispatch.T)

    def start_backward(self, dy_TD: Tensor) -> Promise:
        return self._exchange(dy_TD.flatten(0, -2), self._dispatch.R)

    def _exchange(self, rows: Tensor, count: int) -> Promise:
        moving = self._dispatch.travel((rows,))

        def finish() -> tuple[Tensor]:
            moving.clear()
            return (rows.new_empty(count, rows.shape[1]),)

        return Promise(finish)
