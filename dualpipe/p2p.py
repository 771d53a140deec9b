"""Messages between pipeline ranks: receives posted early, sends waited for late, any torch.distributed backend.

A message is a tuple of tensors whose shapes both sides know from the stage's spec, so no header travels. On a CPU a
thread of their own starts messages (`courier.py`).

Order. Gloo matches messages by tag, so they may be posted in any order. NCCL matches by order alone and runs all
operations of a communicator on one stream, where a receive that was posted early would hold back a later send. So
on NCCL every (direction of travel, cargo) has its own communicator, and within one the plan posts receives in the
order of the sends (`messages.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe.buffers import BufferPool
from dualpipe.courier import courier_for
from dualpipe.messages import Cargo, Message
from dualpipe.stage import TensorSpec

Channel = tuple[bool, Cargo]  # (towards higher ranks?, cargo)
CHANNELS: tuple[Channel, ...] = tuple((up, cargo) for up in (True, False) for cargo in Cargo)
MAX_TENSORS = 16  # per message; makes tags unique


class PeerLostError(RuntimeError):
    """A peer died or did not answer in time; the message says which one and what was expected of it."""


class Transport(Protocol):
    """What the runtime asks of messages: `P2P`, or something around it that emulates a link."""

    def post(self, message: Message, specs: Sequence[TensorSpec]) -> None:
        """Make ready to receive a message."""
        ...

    def receive(self, message: Message) -> tuple[Tensor, ...]:
        """Wait for a message that was posted."""
        ...

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        """Start sending; the tensors are kept until `release` or `finish`."""
        ...

    def release(self, message: Message) -> None:
        """Complete a send that is known to be over, and drop its tensors."""
        ...

    def finish(self) -> None:
        """Complete all sends."""
        ...

    def abandon(self) -> None:
        """Forget everything under way, after a failure."""
        ...

    def report(self, text: str) -> None:
        """Leave word for the other ranks of what failed here."""
        ...

    def reports(self) -> list[str]:
        """What other ranks have left word of."""
        ...


@dataclass(frozen=True)
class Tags:
    """Numbers the messages of one pipeline, from `first` on; each may have MAX_TENSORS tensors."""

    first: int = 0
    num_stages: int = 4096

    def of(self, micro_batch: int, stage: int, cargo: Cargo) -> int:
        return self.first + ((micro_batch * self.num_stages + stage) * 2 + (cargo is Cargo.GRADIENT)) * MAX_TENSORS


@dataclass(frozen=True)
class Links:
    """The process groups that the messages of one pipeline use, the global rank of each PP rank, and its tags."""

    groups: Mapping[Channel, dist.ProcessGroup]
    global_ranks: tuple[int, ...]
    tags: Tags = Tags()

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

    @staticmethod
    def within(group: dist.ProcessGroup, timeout: timedelta, num_stages: int, num_micro_batches: int) -> Links:
        """Links of one pipeline whose PP ranks are the ranks of `group`. Collective over the group.

        On gloo the pipeline takes a range of the group's tags for itself, so several pipelines may share a group. Other
        backends have no tags: each pipeline gets communicators of its own, made among the group alone, for which
        torch asks that its ranks have made equally many groups before.
        """
        ranks = dist.get_process_group_ranks(group)
        backend = dist.get_backend(group)
        if backend == "gloo":
            tags = Tags(0, num_stages)
            size = tags.of(num_micro_batches, 0, Cargo.ACTIVATION)
            first = [group.get_group_store().add("dualpipe/tags", size) - size if dist.get_rank(group) == 0 else 0]
            dist.broadcast_object_list(first, src=ranks[0], group=group)
            if first[0] + size >= 2**31:
                raise ValueError(f"the tags of the group are used up: {first[0]} are taken, {size} are asked for")
            return Links(dict.fromkeys(CHANNELS, group), tuple(ranks), Tags(first[0], num_stages))

        def make() -> Any:
            return dist.new_group(ranks, timeout=timeout, backend=backend, use_local_synchronization=True)

        return Links({channel: make() for channel in CHANNELS}, tuple(ranks))


Moving = tuple[tuple[Tensor, ...], list[Any]]  # the tensors of a message, and the operations that move them


class P2P:
    """Posts and completes the messages of one pipeline rank. A `Transport`.

    Calls the process group itself: `dist.isend` and `dist.irecv` look the same things up again for every message.
    """

    def __init__(self, links: Links, device: torch.device, timeout: timedelta) -> None:
        self._links = links
        self._timeout = timeout
        self._device = device
        self._courier = courier_for(device)
        self._pool = BufferPool(device)
        self._receives: dict[Message, Moving] = {}
        self._sends: dict[Message, Moving] = {}
        self._peers = {
            channel: [dist.get_group_rank(group, rank) for rank in links.global_ranks]
            for channel, group in links.groups.items()
        }

    def post(self, message: Message, specs: Sequence[TensorSpec]) -> None:
        self._courier.hand(self._post, message, specs)

    def receive(self, message: Message) -> tuple[Tensor, ...]:
        received = self._receives.pop(message, None)
        if received is None:  # the courier has not come to it yet
            self._courier.settle()
            received = self._receives.pop(message)
        tensors, operations = received
        self._complete(message, operations, message.source)
        return tensors

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        self._courier.hand(self._send, message, tensors)

    def release(self, message: Message) -> None:
        self._courier.hand(self._release, message)  # the receiver has it: this waits for no more than gloo's own thread

    def finish(self) -> None:
        self._courier.settle()
        for message in tuple(self._sends):
            self._release(message)

    def abandon(self) -> None:
        self._courier.stop()
        self._courier = courier_for(self._device)
        self._receives.clear()
        self._sends.clear()
        self._pool.clear()

    def _post(self, message: Message, specs: Sequence[TensorSpec]) -> None:
        group, peer, tag = self._address(message, message.source, len(specs))
        buffers = tuple([self._pool.take(spec) for spec in specs])
        try:
            self._receives[message] = buffers, [group.recv([b], peer, tag + i) for i, b in enumerate(buffers)]
        except RuntimeError as error:
            raise self._lost(message, message.source, error) from error

    def _send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        group, peer, tag = self._address(message, message.destination, len(tensors))
        buffers = tuple([t.detach().contiguous() for t in tensors])
        try:
            self._sends[message] = buffers, [group.send([b], peer, tag + i) for i, b in enumerate(buffers)]
        except RuntimeError as error:
            raise self._lost(message, message.destination, error) from error

    def _release(self, message: Message) -> None:
        _, operations = self._sends.pop(message)
        self._complete(message, operations, message.destination)

    def report(self, text: str) -> None:
        """Written into the store of the process group, which outlives the rank (unless the store is its own)."""
        for store in self._stores():
            with suppress(RuntimeError):  # nobody can be told: then the rank's own message must do
                store.set(f"failed/{dist.get_rank()}", text)

    def reports(self) -> list[str]:
        """Looks for half a second: who fails reports before its connections break."""
        found: list[str] = []
        deadline = time.monotonic() + 0.5
        while not found and time.monotonic() < deadline:
            time.sleep(0.05)
            for store in self._stores():
                with suppress(RuntimeError):
                    keys = [f"failed/{rank}" for rank in self._links.global_ranks]
                    found += [store.get(key).decode() for key in keys if store.check([key])]
        return found

    def _stores(self) -> list[dist.Store]:
        groups = list(self._links.groups.values())[:1]
        return [group.get_group_store() for group in groups if hasattr(group, "get_group_store")]

    def _address(self, message: Message, pp_rank: int, num_tensors: int) -> tuple[dist.ProcessGroup, int, int]:
        """The group that carries a message, the peer's rank in it, and the tag of the first tensor."""
        if num_tensors > MAX_TENSORS:
            raise ValueError(f"{message} has {num_tensors} tensors; at most {MAX_TENSORS} fit in a message")
        channel = (message.destination > message.source, message.cargo)
        tag = self._links.tags.of(message.micro_batch, message.stage, message.cargo)
        return self._links.groups[channel], self._peers[channel][pp_rank], tag

    def _complete(self, message: Message, operations: list[Any], pp_rank: int) -> None:
        try:
            for operation in operations:
                operation.wait(self._timeout)
        except RuntimeError as error:
            raise self._lost(message, pp_rank, error) from error

    def _lost(self, message: Message, pp_rank: int, error: RuntimeError) -> PeerLostError:
        peer = self._links.global_ranks[pp_rank]
        return PeerLostError(f"lost rank {peer} (PP rank {pp_rank}): {message}: {error}")
