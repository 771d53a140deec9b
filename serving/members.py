"""What the front knows of its engine processes and of the requests that they hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from serving.backend import EngineState
from serving.cluster_options import DECODE
from serving.sequence import Request
from serving.wire import Message, Peer


@dataclass
class Job:
    """A request on its way. made: its first tokens, from prefill. number: of its hand-over, 0 before it has one.

    Held by `reader` until its cache has arrived at `writer`; in between by both, and whoever of them dies, it fails.
    """

    request: Request
    reader: Member | None = None
    writer: Member | None = None
    made: list[int] = field(default_factory=list)
    number: int = 0

    @property
    def tokens(self) -> int:
        return len(self.request.prompt) + len(self.made)


@dataclass
class Room:
    """Free at a decode process, by its newest word less the offers that it had not yet seen then (number → pages)."""

    pages: int = 0
    places: int = 0
    unseen: dict[int, int] = field(default_factory=dict)

    def announce(self, news: Message) -> None:
        self.pages, self.places = news["pages"], news["places"]
        self.unseen = {number: pages for number, pages in self.unseen.items() if number > news["offers"]}

    def offer(self, number: int, pages: int) -> None:
        self.unseen[number] = pages

    @property
    def free_pages(self) -> int:
        return self.pages - sum(self.unseen.values())

    @property
    def free_places(self) -> int:
        return self.places - len(self.unseen)


@dataclass(eq=False)
class Member:
    """An engine process that is there now, and the requests that it holds. ready: it can compute."""

    side: str
    index: int
    pid: int
    peer: Peer
    ready: bool = False
    state: EngineState = field(default_factory=EngineState)
    jobs: dict[str, Job] = field(default_factory=dict)
    room: Room = field(default_factory=Room)

    @property
    def name(self) -> str:
        return f"{self.side} process {self.index}"

    @property
    def reads(self) -> bool:
        """Whether prompts go here."""
        return self.side != DECODE

    @property
    def load(self) -> int:
        """Tokens that it is busy with."""
        return sum(job.tokens for job in self.jobs.values())


@dataclass
class Link:
    """ready: the ends that have it."""

    reader: Member
    writer: Member
    ready: set[Member] = field(default_factory=set)


class Wiring:
    """Links between prefill and decode processes. A name is used once, so nobody waits for somebody who has died."""

    def __init__(self) -> None:
        self._links: dict[str, Link] = {}
        self._numbers = count(1)

    def connect(self, reader: Member, writer: Member) -> None:
        name = f"{reader.index}-{writer.index}-{next(self._numbers)}"
        self._links[name] = Link(reader, writer)
        for rank, member in enumerate((reader, writer)):
            member.peer.send({"kind": "connect", "link": name, "rank": rank})

    def linked(self, member: Member, name: str) -> None:
        """One end says that the link is there."""
        if name in self._links:
            self._links[name].ready.add(member)

    def between(self, reader: Member, writer: Member) -> str | None:
        """The name of the link between these two, if it can be used."""
        found = (n for n, link in self._links.items()
                 if link.reader is reader and link.writer is writer and len(link.ready) == 2)  # fmt: skip
        return next(found, None)

    def reader(self, name: str) -> Member | None:
        """The prefill process of a link; None if there is no such link any more."""
        return self._links[name].reader if name in self._links else None

    def cut(self, name: str) -> Link | None:
        """Forget a link and tell both ends. Returns it; None if it was forgotten already."""
        link = self._links.pop(name, None)
        if link is not None:
            for member in (link.reader, link.writer):
                member.peer.send({"kind": "unlink", "link": name})
        return link

    def leave(self, member: Member) -> None:
        """Cut all links of somebody who is gone."""
        for name in [n for n, link in self._links.items() if member in (link.reader, link.writer)]:
            self.cut(name)


def least_loaded(members: Iterable[Member]) -> Member | None:
    return min(members, key=lambda m: (m.load, m.index), default=None)
