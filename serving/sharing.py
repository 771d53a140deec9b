"""Which processes share the experts of one model: with decode_ep=2 the decode processes 0 and 1, then 2 and 3, …

The front names each group that is to be, and every process of it makes it (`SharedExperts`). When one is lost, those
that are left get a group without it, and read from the checkpoint the experts that went with it; when it is back they
get one more. Until all are there for the first time nobody starts. Requests stay where they are: a step that failed
since somebody was gone is computed again.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

from serving.cluster_options import ClusterOptions
from serving.engine import Engine, Event
from serving.expert_groups import serving_groups
from serving.expert_parallel import ExpertParallel
from serving.members import Member
from serving.wire import Message

TRIES = 5  # steps in a row that fail, with new groups in between, before it is a fault of our own


class Sharing:
    """At the front."""

    def __init__(self, options: ClusterOptions) -> None:
        self._options = options
        self._formed: Counter[tuple[str, int]] = Counter()  # how often, by side and number of the group

    def changed(self, members: Iterable[Member], member: Member) -> None:
        """Somebody came or went: tell all of its group that are there which group is the next."""
        size = self._options.ep(member.side)
        if size == 1:
            return
        group = (member.side, member.index // size)
        there = sorted((m for m in members if (m.side, m.index // size) == group), key=lambda m: m.index)
        if len(there) < size and not self._formed[group]:
            return
        self._formed[group] += 1
        for rank, m in enumerate(there):
            m.peer.send({"kind": "regroup", "name": self.name(m), "rank": rank, "size": len(there)})

    def name(self, member: Member) -> str:
        """Of the group that a process is to be in now."""
        number = member.index // self._options.ep(member.side)
        return f"{member.side}/{number}/{self._formed[member.side, number]}"


class SharedExperts:
    """In a process of such a group. `wanted`: the group to join before the next step; `there`: whether it is in one."""

    def __init__(self, experts: ExpertParallel, store: dist.Store, backend: str, timeout: float) -> None:
        self.experts, self.there, self.name = experts, False, ""
        self.wanted: Message = {}
        self._store, self._backend, self._timeout = store, backend, timedelta(seconds=timeout)
        self._failures = 0

    def join(self) -> bool:
        """Enter the wanted group, with the experts that are this process's there; False if somebody did not come."""
        message, self.wanted = self.wanted, {}
        self.there, self.name = False, message["name"]
        try:
            if dist.is_initialized():
                dist.destroy_process_group()
            place = dist.PrefixStore(f"group/{self.name}", self._store)
            dist.init_process_group("gloo", store=place, rank=message["rank"], world_size=message["size"],
                                    timeout=self._timeout)  # fmt: skip
            groups = serving_groups(range(message["size"]), self._timeout, self._backend)
            self.experts.rebuild(groups)
        except RuntimeError as error:
            self._fail(error)
            return False
        self.there = True
        return True

    def step(self, engine: Engine) -> list[Event]:
        """As `Engine.step`; nothing comes of it, and `there` is false, if somebody was lost."""
        try:
            events = engine.step()
        except RuntimeError as error:
            self.there = False
            self._fail(error)
            return []
        self._failures = 0
        return events

    def _fail(self, error: RuntimeError) -> None:
        self._failures += 1
        if self._failures >= TRIES:
            raise error
        print(f"left the group {self.name}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
