"""Live memory of a pair, measured tensor by tensor, and what a deferred W computes: its products and nothing else."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dualpipe.chunk import Chunk
from dualpipe.lanes import HostLanes, SerialLanes
from dualpipe.overlap import Side, backward_order, forward_order, pair_order, weight_order
from dualpipe.schedules import make_schedule
from model.precision import CastPrecision
from parallel.build import BuildOptions, build_replica
from parallel.mesh import Layout, Mesh
from tests.test_serial_equality import CONFIG, make_batch


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside that are still alive, and their peak; and how often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.calls: Counter[str] = Counter()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Workbench:
    """One stage of the whole model on one rank, and chunks of it."""

    def __init__(self, recompute: bool = False) -> None:
        schedule = make_schedule("one_f_one_b", 1, 1)
        mesh = Mesh(Layout(1, 1, 1), 0, None, None, None, None, None)
        config = replace(CONFIG, num_layers=4, hidden_size=32, recompute=recompute)
        self.replica = build_replica(config, schedule, mesh, CastPrecision(torch.float32), BuildOptions(seed=1))
        self.batch = [replace(mb, loss_scale=1e-2) for mb in make_batch(0, 4)]
        for stage in self.replica.stages.values():
            for parameter in stage.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def open(self, number: int, lanes: Any) -> Chunk:
        segments = self.replica.stages[0].segments(self.batch[number])
        return Chunk((0, number), segments, (), self.replica.queue, True, lanes)

    @torch.no_grad()
    def forward(self, number: int, lanes: Any) -> Chunk:
        chunk = self.open(number, lanes)
        for piece in forward_order(chunk.segments):
            chunk.run(piece, chunk.outputs)
        return chunk

    @torch.no_grad()
    def backward(self, chunk: Chunk, weights: bool = True) -> None:
        seed(chunk)
        for piece in backward_order(chunk.segments, weights):
            chunk.run(piece, lambda: None)


def seed(chunk: Chunk) -> None:
    chunk.seed((torch.ones(1),))


def test_a_pair_holds_no_more_than_its_two_chunks() -> None:
    """Peak of the overlapped pair ≤ both chunks' activations and what one segment needs on top while it runs."""
    bench = Workbench()
    bench.backward(bench.forward(0, HostLanes()))
    with LiveBytes() as one:
        chunk = bench.forward(1, SerialLanes())
        activation, alone = one.live, one.peak
        bench.backward(chunk)
        del chunk
    working = max(alone, one.peak) - activation
    with LiveBytes() as serial:
        first = bench.forward(1, SerialLanes())
        second = bench.forward(2, SerialLanes())
        bench.backward(first)
        del first, second
    with LiveBytes() as pair, torch.no_grad():
        backward = bench.forward(1, HostLanes())
        forward = bench.open(2, HostLanes())
        seed(backward)
        chunks = {Side.FORWARD: forward, Side.BACKWARD: backward}
        for side, piece in pair_order(forward.segments, backward.segments):
            chunks[side].run(piece, forward.outputs if side is Side.FORWARD else lambda: None)
    assert activation > 0
    print(f"activation {activation}, working {working}, F then B {serial.peak}, pair {pair.peak}")
    assert pair.peak <= 2 * activation + 2 * working
    assert pair.peak <= serial.peak


PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "_linear_pointwise")
RECOMPUTED = ("silu", "rsqrt", "sigmoid", "_scaled_dot_product_flash_attention_for_cpu", "_softmax", "embedding")


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_computes_its_products_and_recomputes_nothing(recompute: bool) -> None:
    bench = Workbench(recompute)
    matrices = [p for p in bench.replica.stages[0].parameters() if p.dim() > 1]
    chunk = bench.forward(0, HostLanes())
    bench.backward(chunk, weights=False)
    assert not any(p.grad.count_nonzero() for p in matrices), "a weight gradient was computed in I"  # type: ignore[union-attr]
    with LiveBytes() as weights, torch.no_grad():
        for piece in weight_order(chunk.segments):
            chunk.run(piece, lambda: None)
    assert not {op for op in RECOMPUTED if weights.calls[op]}, weights.calls
    assert sum(weights.calls[op] for op in PRODUCTS) >= len(matrices) - 1  # the embedding has none
    with LiveBytes() as again, torch.no_grad():
        for piece in weight_order(chunk.segments):
            chunk.run(piece, lambda: None)
    assert not again.calls, "W ran twice"


@pytest.mark.parametrize("recompute", [False, True])
def test_split_and_whole_backward_compute_the_same_products(recompute: bool) -> None:
    bench = Workbench(recompute)
    bench.backward(bench.forward(3, HostLanes()))
    counts = []
    for weights in (True, False):
        chunk = bench.forward(0, HostLanes())
        with LiveBytes() as counted, torch.no_grad():
            bench.backward(chunk, weights)
            if not weights:
                for piece in weight_order(chunk.segments):
                    chunk.run(piece, lambda: None)
        counts.append({op: counted.calls[op] for op in (*PRODUCTS, *RECOMPUTED)})
    assert counts[0] == counts[1]
    assert counts[0]["rsqrt"] > 0, "RMSNorm is recomputed in the backward"
    assert counts[0]["silu"] > 0, "SwiGLU is recomputed in the backward"
