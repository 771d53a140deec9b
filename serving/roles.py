"""What an engine process does with the front's messages: read prompts, go on from what was read, or both.

In every process one thread computes, and owns its engine and its pages. Links to the other side have threads of their
own (handover.py), which report to the same inbox as the front does.

    front → engine                                     engine → front
    connect   link, rank                               linked     link
    unlink    link                                     broken     link, reason
    add       request                      (1)         step       events, room
    send      id, number, link             (1)         accepted   id, number, link
    offer     request, made, number, link  (2)         arrived    id
    cancel    id                                       refused    id, reason
    (1) where prompts are read, (2) where they are not

An offer that is accepted has its pages. Each is followed by one `send`, which has a cache travel, or word that there is
none any more. It does not wait for the step in which the prefill process may be: its sequence has left the engine.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from serving.admission import Busy
from serving.engine import Engine
from serving.handover import LinkEnd, Pair, receive_cache, send_cache, send_nothing
from serving.sequence import Sequence
from serving.sides import DecodeEngine, PrefillEngine
from serving.wire import Message, decode_request

Say = Callable[[Message], None]
Connect = Callable[[str, int], Pair]  # name of the link, rank in it


class Role(Protocol):
    """room: what the front must know of free places, sent whenever it changes.

    before_step   called in the thread that computes
    at_once       called in another thread, with every message of the front; True: `obey` need not see it
    """

    @property
    def engine(self) -> Engine: ...

    @property
    def room(self) -> Message: ...

    def obey(self, message: Message) -> None: ...

    def before_step(self) -> None: ...

    def at_once(self, message: Message) -> bool: ...


class BaseRole:
    """Nothing to say, and nothing to do besides `obey`."""

    @property
    def room(self) -> Message:
        return {}

    def before_step(self) -> None:
        pass

    def at_once(self, message: Message) -> bool:
        return False


class Whole(BaseRole):
    """Both halves in one process: requests come, tokens go."""

    def __init__(self, engine: Engine, say: Say) -> None:
        self.engine, self._say = engine, say

    def obey(self, message: Message) -> None:
        if message["kind"] == "add":
            add(self.engine, message, self._say)
        elif message["kind"] == "cancel":
            self.engine.cancel(message["id"])


class Links:
    """This process's ends of links, by name. report: where the threads put what happens (the inbox)."""

    def __init__(self, connect: Connect, report: Say) -> None:
        self._connect, self._report = connect, report
        self._ends: dict[str, LinkEnd] = {}

    def open(self, name: str, rank: int) -> None:
        end = LinkEnd(
            partial(self._connect, name, rank),
            lambda: self._report({"kind": "linked", "link": name}),
            lambda reason: self._report({"kind": "ended", "link": name, "reason": reason}),
        )
        self._ends[name] = end
        end.start()

    def close(self, name: str) -> None:
        """Its thread ends when it has done what it was told, or when it notices that the peer is gone."""
        end = self._ends.pop(name, None)
        if end is not None:
            end.close()

    def do(self, name: str, job: Callable[[Pair], None]) -> bool:
        """False if there is no such link (any more)."""
        end = self._ends.get(name)
        if end is not None:
            end.do(job)
        return end is not None


@dataclass
class Leaving:
    """A sequence whose cache is being sent, or is expected."""

    link: str
    sequence: Sequence
    cancelled: bool = False


class Prefill(BaseRole):
    """Reads prompts; sends their caches away when the front says where to."""

    def __init__(self, engine: PrefillEngine, say: Say, links: Links, report: Say) -> None:
        self.engine, self._say, self._links, self._report = engine, say, links, report
        self._leaving: dict[int, Leaving] = {}
        self._lock = threading.Lock()  # for _leaving

    def obey(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "add":
            add(self.engine, message, self._say)
        elif kind == "cancel":
            self.engine.cancel(message["id"])
        elif kind == "sent":
            self._release(message["number"])
        obey_links(message, self._links, self._say)
        if kind == "ended":  # its link is closed first: what `at_once` still puts there is found here or refused there
            with self._lock:
                lost = [n for n, leaving in self._leaving.items() if leaving.link == message["link"]]
            for number in lost:
                self._release(number)

    def at_once(self, message: Message) -> bool:
        """A parked sequence is nothing to the engine, so it can leave while the engine computes."""
        if message["kind"] != "send":
            return False
        number, link, sequence = message["number"], message["link"], self.engine.leave(message["id"])
        if sequence is None:
            self._links.do(link, lambda pair: send_nothing(pair, number))
            return True
        cache, slots = self.engine.decoder.cache, sequence.slots[: sequence.cached]

        def job(pair: Pair) -> None:
            send_cache(pair, number, cache, slots)
            self._report({"kind": "sent", "number": number})

        with self._lock:
            self._leaving[number] = Leaving(link, sequence)
        if not self._links.do(link, job):
            self._report({"kind": "sent", "number": number})
        return True

    def _release(self, number: int) -> None:
        with self._lock:
            leaving = self._leaving.pop(number, None)
        if leaving is not None:
            self.engine.release(leaving.sequence)


class Decode(BaseRole):
    """Takes in what was read elsewhere, in the order of the offers, and makes the other tokens."""

    def __init__(self, engine: DecodeEngine, say: Say, links: Links, report: Say) -> None:
        self.engine, self._say, self._links, self._report = engine, say, links, report
        self._offers: deque[Message] = deque()
        self._seen = 0
        self._coming: dict[int, Leaving] = {}

    @property
    def room(self) -> Message:
        """pages, places: free, less those for offers that found no room yet. offers: the newest one that is counted."""
        pages, places = self.engine.pool.free, self.engine.places
        for offer in self._offers:
            pages -= self.engine.pool.pages_for(len(offer["request"]["prompt"]) + len(offer["made"]))
            places -= 1
        if self.engine.scheduler.waiting:  # whoever was preempted comes first
            places = 0
        return {"pages": pages, "places": places, "offers": self._seen}

    def obey(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "offer":
            self._seen = message["number"]
            self._offers.append(message)
        elif kind == "cancel":
            self._cancel(message["id"])
        elif kind == "came":
            self._came(message["number"], message["whole"])
        elif kind == "ended":
            for number in [n for n, c in self._coming.items() if c.link == message["link"]]:
                self.engine.release(self._coming.pop(number).sequence)
        obey_links(message, self._links, self._say)

    def before_step(self) -> None:
        """Take in offers while there is room; their caches travel from now on."""
        while self._offers:
            offer = self._offers[0]
            sequence = self.engine.reserve(decode_request(offer["request"]), offer["made"])
            if sequence is None:
                return
            self._offers.popleft()
            self._receive(offer["link"], offer["number"], sequence)

    def _receive(self, link: str, number: int, sequence: Sequence) -> None:
        cache, slots, id = self.engine.decoder.cache, sequence.slots[: sequence.cached], sequence.request.id

        def job(pair: Pair) -> None:
            whole = receive_cache(pair, number, cache, slots)
            self._report({"kind": "came", "number": number, "whole": whole})

        if self._links.do(link, job):
            self._coming[number] = Leaving(link, sequence)
            self._say({"kind": "accepted", "id": id, "number": number, "link": link})
        else:
            self.engine.release(sequence)

    def _came(self, number: int, whole: bool) -> None:
        coming = self._coming.pop(number)
        if coming.cancelled or not whole:
            self.engine.release(coming.sequence)
            return
        self.engine.adopt(coming.sequence)
        self._say({"kind": "arrived", "id": coming.sequence.request.id})

    def _cancel(self, id: str) -> None:
        """What was accepted must still arrive: the link knows nothing of requests."""
        self.engine.cancel(id)
        self._offers = deque(offer for offer in self._offers if offer["request"]["id"] != id)
        for coming in self._coming.values():
            coming.cancelled |= coming.sequence.request.id == id


def add(engine: Engine, message: Message, say: Say) -> None:
    """Queue a request; the front hears if that is impossible."""
    request = decode_request(message["request"])
    try:
        engine.add(request)
    except (ValueError, Busy) as error:
        say({"kind": "refused", "id": request.id, "reason": str(error)})


def obey_links(message: Message, links: Links, say: Say) -> None:
    """What both sides do about links."""
    kind = message["kind"]
    if kind == "connect":
        links.open(message["link"], message["rank"])
    elif kind == "unlink":
        links.close(message["link"])
    elif kind == "linked":
        say(message)
    elif kind == "ended":
        links.close(message["link"])
        say({**message, "kind": "broken"})
