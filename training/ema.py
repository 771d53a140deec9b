"""A moving average of the weights, kept on the CPU and brought up to date while training goes on.

    average ← decay · average + (1 − decay) · weights, after every update, in FP32

Each rank averages the shares that it owns, so memory and work are shared out like ZeRO-1's whatever the stage. The
work runs in a thread under the next step's pipeline: on a CPU it reads the master weights where they are, from a GPU
they are copied beside the computation. It must be done before the next update changes the weights, which waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from parallel.fragments import Fragment, bucket_fragments
from parallel.update import Update


class WeightAverage:
    """decay per update, in (0, 1). Starts at the weights as they are."""

    def __init__(self, update: Update, decay: float) -> None:
        self._update, self._decay = update, decay
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._pending: Future[None] | None = None
        self.values = [shard.owned(shard.master).detach().cpu().clone() for shard in update.shards]
        update.before_change.append(self.wait)

    def start(self) -> None:
        """The weights have been updated: begin to follow."""
        self.wait()
        sources, arrived = self._sources()
        self._pending = self._thread.submit(self._follow, sources, arrived)

    def wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def reset(self) -> None:
        """Start again at the weights as they are: a checkpoint without an average was loaded."""
        self.wait()
        for values, shard in zip(self.values, self._update.shards, strict=True):
            values.copy_(shard.owned(shard.master))

    def fragments(self) -> Iterator[Fragment]:
        """The averages by name, to save or to load."""
        self.wait()
        for values, shard in zip(self.values, self._update.shards, strict=True):
            yield from bucket_fragments(shard, "ema.", values, shard.bucket.share)

    @contextmanager
    def applied(self, refresh: Callable[[], None]) -> Iterator[None]:
        """The model computes with the average inside the `with` block; collective. `refresh` forgets cached copies."""
        self._swap(refresh)
        try:
            yield
        finally:
            self._swap(refresh)

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()

    @torch.no_grad()
    def _swap(self, refresh: Callable[[], None]) -> None:
        self.wait()
        for values, shard in zip(self.values, self._update.shards, strict=True):
            master = shard.owned(shard.master)
            kept = values.clone()
            values.copy_(master)
            master.copy_(kept)
        self._update.publish()
        refresh()

    def _sources(self) -> tuple[list[Tensor], torch.cuda.Event | None]:
        masters = [shard.owned(shard.master) for shard in self._update.shards]
        if not masters[0].is_cuda:
            return masters, None
        copies = [torch.empty(m.shape, dtype=m.dtype, pin_memory=True) for m in masters]
        for copy, master in zip(copies, masters, strict=True):
            copy.copy_(master, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return copies, event

    @torch.no_grad()
    def _follow(self, sources: list[Tensor], arrived: torch.cuda.Event | None) -> None:
        if arrived is not None:
            arrived.synchronize()
        for values, source in zip(self.values, sources, strict=True):
            values.lerp_(source, 1 - self._decay)
