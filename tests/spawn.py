"""Runs a function in several real processes joined by a gloo group, and brings back what each returns.

A failing rank's traceback is shown as its own; the others are ended at once. Nothing outlives the call. Processes
come from a fork server that has imported torch once, so starting eight of them takes a second.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any


class RankFailed(AssertionError):
    """A rank raised or died; the message holds its traceback."""


def fork_server() -> Any:
    """The multiprocessing context of all tests that start processes; the server has imported tests/preload.py.

    It is one for the whole run, and what it loads is settled when its first process starts.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


def run_ranks(
    world: int, fn: Callable[..., Any], *args: Any, timeout: float = 300, lost: Sequence[int] = ()
) -> list[Any]:
    """fn(rank, world, *args) in `world` processes; `fn` is a top-level function. Returns their results in order.

    lost   ranks that will be killed, and have no result
    """
    context = fork_server()
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_main, args=(rank, world, folder, fn, args, results, bool(lost)), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, results, time.monotonic() + timeout, lost)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def share_out(rank: int, world: int, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """[work(item) for item in items] on every rank, where each is computed by one rank only. Collective.

    For what all ranks compare with: eight processes that compute the same on two cores take four times as long.
    """
    import torch.distributed as dist

    group = dist.new_group(timeout=timedelta(seconds=500))  # some wait for as long as others compute
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, [work(item) for item in items[rank::world]], group)
    return [parts[i % world][i // world] for i in range(len(items))]


def _collect(processes: list[Any], results: Any, deadline: float, lost: Sequence[int]) -> list[Any]:
    found: dict[int, Any] = dict.fromkeys(lost)
    while len(found) < len(processes):
        try:
            rank, value, error = results.get(timeout=0.2)
        except queue.Empty:
            dead = [r for r, p in enumerate(processes) if r not in found and p.exitcode not in (None, 0)]
            if dead:
                raise RankFailed(f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}") from None
            if time.monotonic() > deadline:
                silent = [r for r in range(len(processes)) if r not in found]
                raise RankFailed(f"ranks {silent} did not finish in time") from None
            continue
        if error is not None:
            raise RankFailed(f"rank {rank} failed:\n{error}")
        found[rank] = value
    return [found[r] for r in range(len(processes))]


def _main(
    rank: int, world: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...], results: Any, some_lost: bool
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    try:
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
        results.put((rank, fn(rank, world, *args), None))
        if not some_lost:
            dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
