"""A sequence's latent cache goes from a prefill to a decode process: a group of two ranks, and the blocks that travel.

A link is a torch.distributed group of one prefill and one decode process, so whoever dies breaks the links to itself
and no other. Either end has a thread: the engines go on computing while a cache travels, and touch other slots. First
comes a header, then all layers of BLOCK tokens at a time, taken from the sender's pages and put into the receiver's.

Shapes: L layers, N tokens of a block, C = key_value_rank + rope_dim.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.latent_cache import LatentCache

BLOCK = 256  # tokens
BACKENDS = ("gloo", "nccl")


class HandoverError(RuntimeError):
    """What arrived is not what was announced."""


class Pair:
    """A group of two ranks. Rank 0 is the prefill side.

    device   where the caches are; with gloo, what travels passes through the CPU
    """

    def __init__(self, backend: str, store: dist.Store, rank: int, timeout: float, device: torch.device) -> None:
        """Waits for the other end, at most `timeout` seconds, as later does every send and receive."""
        self.device, self._peer = device, 1 - rank
        self._wire = torch.device("cpu") if backend == "gloo" else device
        self._group = _two_ranks(backend, store, rank, timedelta(seconds=timeout))

    def send(self, tensor: Tensor) -> None:
        self._group.send([tensor.to(self._wire)], self._peer, 0).wait()
        self._settle()

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        empty = torch.empty(shape, dtype=dtype, device=self._wire)
        self._group.recv([empty], self._peer, 0).wait()
        self._settle()
        return empty.to(self.device)

    def _settle(self) -> None:
        """NCCL has only been told so far: wait until it is done."""
        if self._wire.type == "cuda":
            torch.cuda.current_stream(self._wire).synchronize()


def send_cache(pair: Pair, number: int, cache: LatentCache, slots_T: Tensor) -> None:
    """Send the latents in these slots, as hand-over `number`."""
    pair.send(torch.tensor([number, len(slots_T)], dtype=torch.int64))
    for slots_N in slots_T.split(BLOCK):
        pair.send(cache.take(slots_N))


def send_nothing(pair: Pair, number: int) -> None:
    """Say that hand-over `number` will not take place, to whoever waits for it."""
    pair.send(torch.tensor([number, 0], dtype=torch.int64))


def receive_cache(pair: Pair, number: int, cache: LatentCache, slots_T: Tensor) -> bool:
    """Receive hand-over `number` into these slots; False if it does not take place.

    Raises HandoverError if another one comes.
    """
    arrived = pair.receive((2,), torch.int64).tolist()
    if arrived == [number, 0]:
        return False
    if arrived != [number, len(slots_T)]:
        raise HandoverError(f"hand-over {number} of {len(slots_T)} tokens was to come, but {arrived} came")
    layers, _, width = cache.latents.shape
    for slots_N in slots_T.split(BLOCK):
        cache.put(slots_N, pair.receive((layers, len(slots_N), width), cache.latents.dtype))
    if cache.latents.device.type == "cuda":
        torch.cuda.current_stream(cache.latents.device).synchronize()
    return True


class LinkEnd(threading.Thread):
    """One end of a link: connects, then does its jobs in order, until one fails or `close`.

    connected   called in the thread when both ends are there
    ended       called in the thread with the reason, or None after `close`; nothing touches the cache after it
    """

    def __init__(self, connect: Callable[[], Pair], connected: Callable[[], None], ended: Callable[[str | None], None]
                 ) -> None:  # fmt: skip
        super().__init__(name="link", daemon=True)
        self._connect, self._connected, self._ended = connect, connected, ended
        self._jobs: queue.SimpleQueue[Callable[[Pair], None] | None] = queue.SimpleQueue()

    def do(self, job: Callable[[Pair], None]) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """End after the jobs that are here already."""
        self._jobs.put(None)

    def run(self) -> None:
        reason = None
        try:
            pair = self._connect()
            self._connected()
            with _own_stream(pair.device):
                while (job := self._jobs.get()) is not None:
                    job(pair)
        except Exception as error:  # the backends raise whatever they like when a peer is lost
            reason = f"{type(error).__name__}: {error}"
        self._ended(reason)


def _two_ranks(backend: str, store: dist.Store, rank: int, timeout: timedelta) -> Any:
    """Made directly: groups of `dist.new_group` belong to a world, which could not lose and regain processes."""
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, 2, timeout)
    if backend != "nccl":
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, 2, options)


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    """On a GPU, hand-overs run beside the engine's kernels."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
