"""Messages between pipeline ranks: receives posted early, sends waited for late, any torch.distributed backend.

A message is a tuple of tensors whose shapes both sides know from the stage's spec, so no header travels.

Order. Gloo matches messages by tag, so they may be posted in any order. NCCL matches by order alone and runs all
operations of a communicator on one stream, where a receive that was posted early would hold back a later send. So
on NCCL every (direction of travel, cargo) has its own communicator, and within one the plan posts receives in the
order of the sends (`messages.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe.messages import Cargo, Message
from dualpipe.stage import TensorSpec

Channel = tuple[bool, Cargo]  # (towards higher ranks?, cargo)
CHANNELS: tuple[Channel, ...] = tuple((up, cargo) for up in (True, False) for cargo in Cargo)
MAX_TENSORS = 16  # per message; makes tags unique


class PeerLostError(RuntimeError):
    """A peer died or did not answer in time; the message says which one and what was expected of it."""


@dataclass(frozen=True)
class Links:
    """The process groups that the messages of one pipeline use, and the global rank of each PP rank."""

    groups: Mapping[Channel, dist.ProcessGroup | None]
    global_ranks: tuple[int, ...]

    @staticmethod
    def create(pipelines: Sequence[Sequence[int]], timeout: timedelta, backend: str | None = None) -> Links:
        """Make the groups of all pipelines (lists of global ranks in PP order) and return this process's.

        Collective over the default group: every process calls it with the same lists. Raises ValueError if this
        process is in none of them.
        """
        rank = dist.get_rank()
        ordered = (backend or dist.get_backend()) != "gloo"
        mine: Links | None = None
        for ranks in pipelines:
            groups: dict[Channel, Any] = {}
            if ordered:
                groups = {c: dist.new_group(list(ranks), timeout=timeout, backend=backend) for c in CHANNELS}
            else:
                shared = dist.new_group(list(ranks), timeout=timeout, backend=backend)
                groups = dict.fromkeys(CHANNELS, shared)
            if rank in ranks:
                mine = Links(groups, tuple(ranks))
        if mine is None:
            raise ValueError(f"rank {rank} is in none of the pipelines {[list(p) for p in pipelines]}")
        return mine


class P2P:
    """Posts and completes the messages of one pipeline rank."""

    def __init__(self, links: Links, device: torch.device, timeout: timedelta) -> None:
        self._links = links
        self._device = device
        self._timeout = timeout
        self._receives: dict[Message, list[tuple[Tensor, Any]]] = {}
        self._sends: dict[Message, list[tuple[Tensor, Any]]] = {}

    def post(self, message: Message, specs: Sequence[TensorSpec]) -> None:
        """Post the receive of a message."""
        buffers = [torch.empty(s.shape, dtype=s.dtype, device=self._device) for s in specs]
        peer = self._links.global_ranks[message.source]
        self._receives[message] = self._start(dist.irecv, message, buffers, peer)

    def receive(self, message: Message) -> tuple[Tensor, ...]:
        """Wait for a posted message."""
        return tuple(self._complete(message, self._receives.pop(message), message.source))

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        """Start sending; the tensors are kept until `release` or `finish`."""
        buffers = [t.detach().contiguous() for t in tensors]
        peer = self._links.global_ranks[message.destination]
        self._sends[message] = self._start(dist.isend, message, buffers, peer)

    def release(self, message: Message) -> None:
        """Complete a send that the plan knows to be over, and drop its tensors."""
        self._complete(message, self._sends.pop(message), message.destination)

    def finish(self) -> None:
        """Complete all sends."""
        for message in tuple(self._sends):
            self.release(message)

    def abandon(self) -> None:
        """Forget everything under way, after a failure."""
        self._receives.clear()
        self._sends.clear()

    def _start(
        self, operation: Callable[..., Any], message: Message, buffers: list[Tensor], peer: int
    ) -> list[tuple[Tensor, Any]]:
        if len(buffers) > MAX_TENSORS:
            raise ValueError(f"{message} has {len(buffers)} tensors; at most {MAX_TENSORS} fit in a message")
        group = self._links.groups[message.destination > message.source, message.cargo]
        base = (message.micro_batch * 4096 + message.stage) * 2 + (message.cargo is Cargo.GRADIENT)
        try:
            return [(b, operation(b, peer, group=group, tag=base * MAX_TENSORS + i)) for i, b in enumerate(buffers)]
        except RuntimeError as error:
            raise PeerLostError(f"cannot reach rank {peer}: {message}: {error}") from error

    def _complete(self, message: Message, parts: list[tuple[Tensor, Any]], pp_rank: int) -> list[Tensor]:
        try:
            for _, work in parts:
                work.wait(self._timeout)
        except RuntimeError as error:
            peer = self._links.global_ranks[pp_rank]
            raise PeerLostError(f"lost rank {peer} (PP rank {pp_rank}): {message}: {error}") from error
        return [tensor for tensor, _ in parts]
