"""Saving without stopping: training pauses for a copy in memory; a thread writes, checks, seals and prunes.

The copy (staging) goes to host memory that is kept for the next time. The thread has a process group of its own, so
its messages never mix with the training's. Files are written into `.writing_step_…`, which is renamed once everything
is on disk and sealed; a folder called step_… is always whole. One save is under way at a time: the next one waits
for it. An error in the thread comes out at the next `poll`, `save` or `close`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.fragments import Fragment, save_fragments
from parallel.integrity import Entry, digest, flush, seal
from parallel.mesh import Mesh
from parallel.saved import CheckpointError, RunState, all_checkpoints, checkpoint_path, list_checkpoints, step_of

PATIENCE = timedelta(minutes=30)  # for the slowest rank's disk


class CheckpointWriter:
    """Saves checkpoints of one run into `folder`; made by all ranks together.

    keep_last    this many of the newest stay
    keep_every   and those whose step is a multiple of it (0: none)
    """

    def __init__(self, folder: Path, mesh: Mesh, keep_last: int, keep_every: int = 0) -> None:
        self.folder = folder
        self._mesh = mesh
        self._keep_last, self._keep_every = keep_last, keep_every
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if mesh.layout.world > 1 else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[float] | None = None
        self._stage = Staging()

    def save(self, state: RunState, fragments: Iterable[Fragment]) -> float:
        """Start saving these fragments of this rank; returns for how many seconds training was held up."""
        started = time.perf_counter()
        self.wait()
        staged = self._stage.copy(fragments)
        self._pending = self._thread.submit(self._write, state, staged)
        return time.perf_counter() - started

    def poll(self) -> float | None:
        """If a save has just ended: the seconds that it took. Raises CheckpointError if it failed."""
        return self.wait() if self._pending is not None and self._pending.done() else None

    def wait(self) -> float | None:
        """Wait until what was started is on disk."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            return pending.result()
        except Exception as error:
            raise CheckpointError(f"a checkpoint could not be saved in {self.folder}: {error}") from error

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()

    # -- in the thread -----------------------------------------------------------------------------------------

    def _write(self, state: RunState, fragments: list[Fragment]) -> float:
        started = time.perf_counter()
        target = checkpoint_path(self.folder, state.step)
        writing = self.folder / f".writing_{target.name}"
        first = self._mesh.rank == 0
        try:
            self._together(lambda: _make_anew(writing) if first else None)
            save_fragments(writing, fragments, self._group)
            mine = f"__{self._mesh.rank}_*.distcp"
            tables = self._together(lambda: {path.name: digest(path) for path in writing.glob(mine)})
            entries = {name: entry for table in tables for name, entry in table.items()}
            self._together(lambda: self._finish(state, writing, target, entries) if first else None)
        except Exception as error:
            reason = f"{error}{_lack_of_room(self.folder, fragments)}"
            if first:
                shutil.rmtree(writing, ignore_errors=True)  # a full disk has better use for the room
            raise CheckpointError(reason) from error
        return time.perf_counter() - started

    def _finish(self, state: RunState, writing: Path, target: Path, entries: dict[str, Entry]) -> None:
        (writing / "run.json").write_text(json.dumps(vars(state), indent=1) + "\n")
        flush(writing / "run.json")
        seal(writing, {**entries, **{name: digest(writing / name) for name in ("run.json", ".metadata")}})
        if target.exists():
            shutil.rmtree(target)
        os.rename(writing, target)
        flush(self.folder)
        prune(self.folder, self._keep_last, self._keep_every)

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """Do this on every rank; returns what each rank got. Raises the first rank's error, on all of them."""
        mine: tuple[Any, str | None]
        try:
            mine = action(), None
        except Exception as error:
            mine = None, f"{error}"
        results = self._gather(mine)
        for rank, (_, problem) in enumerate(results):
            if problem is not None:
                raise CheckpointError(f"on rank {rank}: {problem}")
        return [value for value, _ in results]

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self._mesh.layout.world
        dist.all_gather_object(values, value, group=self._group)
        return values


def _lack_of_room(folder: Path, fragments: Iterable[Fragment]) -> str:
    """What to add to the error of a failed save if the disk is too full for it: torch's writer names no reason, only
    that it stands at another byte than it thought."""
    free, needed = shutil.disk_usage(folder).free, sum(f.values.nbytes for f in fragments)
    return f" (No space left on device: {free:,} bytes are free, this rank saves {needed:,})" if free < needed else ""


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


class Staging:
    """Copies of fragments in host memory, pinned if they come from a GPU; the memory is used again each time."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def copy(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        staged, on_gpu = [], False
        for fragment in fragments:
            values = fragment.values
            buffer = self._buffers.get(fragment.key)
            if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
                buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
                self._buffers[fragment.key] = buffer
            buffer.copy_(values, non_blocking=True)
            on_gpu = on_gpu or values.is_cuda
            staged.append(Fragment(fragment.name, fragment.shape, fragment.start, buffer))
        if on_gpu:
            torch.cuda.synchronize()
        return staged


def prune(folder: Path, keep_last: int, keep_every: int = 0) -> None:
    """Delete old checkpoints, and what a killed save left behind. Damaged ones do not count as kept."""
    kept = set(list_checkpoints(folder)[-keep_last:])
    newest = max((step_of(p) for p in kept), default=-1)
    for path in all_checkpoints(folder):
        step = step_of(path)
        if path not in kept and step < newest and not (keep_every and step % keep_every == 0):
            shutil.rmtree(path)
    for torn in folder.glob(".writing_*"):
        shutil.rmtree(torn)
