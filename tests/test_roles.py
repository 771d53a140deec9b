"""What engine processes do with the messages of the front, without processes: offers, caches on their way, losses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from serving.handover import Pair
from serving.roles import Decode, Links, Prefill
from serving.sequence import Request, Sequence
from serving.wire import Message, encode_request
from tests.test_engine import GREEDY
from tests.test_handover import decode, prefill

REQUESTS = {id: Request(id, tuple(range(1, 17)), 5, GREEDY) for id in "abcd"}


class FakeLinks(Links):
    """One link, "x"; its jobs are kept."""

    def __init__(self) -> None:
        super().__init__(lambda name, rank: None, lambda message: None)  # type: ignore[arg-type, return-value]
        self.jobs: list[Callable[[Pair], None]] = []

    def do(self, name: str, job: Callable[[Pair], None]) -> bool:
        if name == "x":
            self.jobs.append(job)
        return name == "x"


class Decoding:
    """A decode process with room for two of the requests."""

    def __init__(self) -> None:
        self.said: list[Message] = []
        self.links = FakeLinks()
        self.role = Decode(decode(False, pages=6), self.said.append, self.links, lambda message: None)

    def offer(self, id: str, number: int, link: str = "x") -> None:
        request = encode_request(REQUESTS[id])
        self.role.obey({"kind": "offer", "request": request, "made": [3], "number": number, "link": link})

    def came(self, number: int, whole: bool = True) -> None:
        self.role.obey({"kind": "came", "number": number, "whole": whole})

    def heard(self, kind: str) -> list[str]:
        return [m["id"] for m in self.said if m["kind"] == kind]

    @property
    def used(self) -> int:
        return self.role.engine.pool.used


def test_an_offer_is_accepted_as_soon_as_there_is_room() -> None:
    """No message comes when a sequence ends, and still the next offer is taken in."""
    d = Decoding()
    for number, id in enumerate("abc", 1):
        d.offer(id, number)
    d.role.before_step()
    assert d.heard("accepted") == ["a", "b"]
    assert d.role.room == {"pages": 0 - 3, "places": 0, "offers": 3}
    d.came(1)
    d.came(2)
    assert d.heard("arrived") == ["a", "b"]
    for _ in range(4):
        d.role.engine.step()
    assert d.role.engine.idle
    d.role.before_step()
    assert d.heard("accepted") == ["a", "b", "c"]
    assert d.role.room == {"pages": 3, "places": 2, "offers": 3}


def test_who_is_not_wanted_any_more_frees_its_pages() -> None:
    d = Decoding()
    for number, id in enumerate("abcd", 1):
        d.offer(id, number)
    d.role.before_step()
    d.role.obey({"kind": "cancel", "id": "a"})  # accepted: its cache, or word that there is none, is still to come
    d.role.obey({"kind": "cancel", "id": "c"})  # not accepted
    assert d.used == 6
    d.came(1)
    assert d.used == 3
    d.role.before_step()
    assert d.heard("accepted") == ["a", "b", "d"]
    d.came(2, whole=False)
    d.role.obey({"kind": "ended", "link": "x", "reason": None})
    assert d.used == 0
    assert d.heard("arrived") == []
    d.offer("a", 5, link="gone")
    d.role.before_step()
    assert d.used == 0
    assert d.heard("accepted") == ["a", "b", "d"]


def test_a_parked_prompt_leaves_while_the_engine_computes_and_frees_its_pages_when_it_is_gone() -> None:
    links, said, reports = FakeLinks(), [], []
    role = Prefill(prefill(False), said.append, links, reports.append)
    add: dict[str, Any] = {"kind": "add", "request": encode_request(REQUESTS["a"])}
    role.obey(add)
    role.obey(add)
    assert "there is a request with the id 'a' already" in said[0]["reason"]
    role.engine.step()
    assert role.engine.pool.used == 4
    assert not role.at_once({"kind": "cancel", "id": "a"}), "that is for the engine's thread"
    assert role.at_once({"kind": "send", "id": "a", "number": 1, "link": "x"})
    assert role.at_once({"kind": "send", "id": "b", "number": 2, "link": "x"})
    assert len(links.jobs) == 2
    tensors: list[Any] = []

    class FakePair:
        def send(self, tensor: Any) -> None:
            tensors.append(tensor)

    links.jobs[1](FakePair())  # type: ignore[arg-type]
    assert [t.tolist() for t in tensors] == [[2, 0]], "b is not here, and whoever waits for it must know"
    assert role.engine.pool.used == 4
    links.jobs[0](FakePair())  # type: ignore[arg-type]
    assert tensors[1].tolist() == [1, 16]
    role.obey(reports[0])
    assert role.engine.pool.used == 0
    role.obey({**add, "request": encode_request(REQUESTS["c"])})
    role.engine.step()
    role.at_once({"kind": "send", "id": "c", "number": 3, "link": "x"})
    role.obey({"kind": "ended", "link": "x", "reason": "lost"})
    assert role.engine.pool.used == 0
    assert said[-1] == {"kind": "broken", "link": "x", "reason": "lost"}


def test_a_cache_that_leaves_through_a_link_that_is_just_ending_frees_its_pages() -> None:
    class Ending(FakeLinks):
        def close(self, name: str) -> None:
            role.at_once({"kind": "send", "id": "a", "number": 1, "link": "x"})  # another thread, at this moment
            super().close(name)

    role = Prefill(prefill(False), lambda message: None, Ending(), lambda message: None)
    role.obey({"kind": "add", "request": encode_request(REQUESTS["a"])})
    role.engine.step()
    assert role.engine.pool.used == 4
    role.obey({"kind": "ended", "link": "x", "reason": "lost"})
    assert role.engine.pool.used == 0


def test_a_parked_prompt_either_leaves_or_is_cancelled() -> None:
    e = prefill(False)
    e.add(REQUESTS["a"])
    e.step()
    thread = threading.Thread(target=e.cancel, args=("a",))

    class Parked(dict[str, Sequence]):
        def pop(self, *arguments: Any) -> Any:
            if not thread.ident:  # the engine's thread cancels while another one lets it leave
                thread.start()
                thread.join(0.1)
            return super().pop(*arguments)

    e.parked = Parked(e.parked)
    sequence = e.leave("a")
    thread.join()
    assert sequence is not None
    assert e.pool.used == 4
    e.release(sequence)
    assert e.pool.used == 0
