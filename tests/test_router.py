"""The front by itself: who gets which request, who hears what when somebody dies, and who is let in."""

from __future__ import annotations

import asyncio
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from serving import wire
from serving.admission import Busy, Refused
from serving.calls import Delta
from serving.cluster_options import ClusterOptions
from serving.router import AGAIN_SECONDS, Router
from serving.sequence import Request
from serving.tokenizers import Bytes
from serving.wire import Channel, Message, NotTrusted, decode_request, encode_request
from tests.test_engine import GREEDY


class FakePeer:
    """Keeps what the front says."""

    def __init__(self) -> None:
        self.said: list[Message] = []

    def send(self, message: Message) -> None:
        self.said.append(message)

    def close(self) -> None:
        pass

    def take(self, kind: str) -> list[Message]:
        found = [m for m in self.said if m["kind"] == kind]
        self.said = [m for m in self.said if m["kind"] != kind]
        return found


class Front:
    """A router with engine processes that say what the test wants."""

    def __init__(self, prefill: int = 1, decode: int = 2, **more: Any) -> None:
        given = {"page_size": 4, **more}
        options = ClusterOptions(
            checkpoint="x", prefill=prefill, decode=decode, prefill_sequences=2, waiting=2, max_sequences=2,
            cache_tokens=64, **given,
        )  # fmt: skip
        self.complete = False
        self.router = Router(options, Bytes(), 257, 100, "127.0.0.1", lambda where: None, self.is_complete)
        self.prefill = [self.join("prefill", i) for i in range(prefill)]
        self.decode = [self.join("decode", i) for i in range(decode)]
        self.link()

    def is_complete(self) -> None:
        self.complete = True

    def join(self, side: str, index: int) -> FakePeer:
        peer = FakePeer()
        self.router.joined(peer, {"side": side, "index": index, "pid": 1})  # type: ignore[arg-type]
        self.say(peer, "ready")
        if side == "decode":
            self.room(peer, 0, 16, 2)
        return peer

    def link(self) -> None:
        for peer in (*self.prefill, *self.decode):
            for message in peer.take("connect"):
                self.say(peer, "linked", link=message["link"])

    def say(self, peer: FakePeer, kind: str, **more: Any) -> None:
        self.router.received(peer, {"kind": kind, **more})  # type: ignore[arg-type]

    def room(self, peer: FakePeer, offers: int, pages: int, places: int) -> None:
        self.say(peer, "step", events=[], room={"pages": pages, "places": places, "offers": offers})

    def made(self, peer: FakePeer, id: str, tokens: list[int], finish: str | None = None) -> None:
        self.say(peer, "step", events=[[id, tokens, finish]])

    def ask(self, id: str, prompt: int = 6, tokens: int = 5) -> asyncio.Queue[Delta]:
        return self.router.submit([Request(id, (65,) * prompt, tokens, GREEDY)], [])


def offers(front: Front) -> list[list[str]]:
    return [[m["request"]["id"] for m in peer.take("offer")] for peer in front.decode]


async def read_prompts(front: Front, *ids: str) -> None:
    for id in ids:
        front.ask(id)
        front.made(front.prefill[0], id, [66])


def run(test: Any) -> None:
    asyncio.run(test())


def test_an_answer_may_be_as_long_as_a_decode_process_holds() -> None:
    assert Front(page_size=5).router.max_length == 60


def test_a_token_that_comes_while_the_front_stops_hurts_nobody() -> None:
    async def test() -> None:
        front = Front()
        answers = front.ask("a")
        await front.router.stop()
        front.made(front.prefill[0], "a", [66])
        await asyncio.sleep(0)
        assert answers.get_nowait().error == "the server is shutting down"

    run(test)


def test_a_request_goes_to_whoever_has_room_and_waits_where_nobody_has() -> None:
    async def test() -> None:
        front = Front()
        assert front.complete
        front.room(front.decode[1], 0, 3, 2)
        await read_prompts(front, "a")
        (offer,) = front.decode[0].said
        assert offers(front) == [["a"], []], "to the one with more free pages"
        accepted = {"id": "a", "number": offer["number"], "link": offer["link"]}
        assert not front.prefill[0].take("send")
        front.say(front.decode[0], "accepted", **accepted)
        assert front.prefill[0].take("send") == [{"kind": "send", **accepted}]
        await read_prompts(front, "b")
        assert offers(front) == [["b"], []]
        front.ask("c")
        assert not front.prefill[0].take("add")[2:], "a prefill process has two places, and a and b are still there"
        front.say(front.decode[0], "arrived", id="a")
        assert [m["request"]["id"] for m in front.prefill[0].take("add")] == ["c"]
        front.made(front.prefill[0], "c", [66])
        assert offers(front) == [[], ["c"]], "the first one has no place"
        front.say(front.decode[0], "arrived", id="b")
        front.say(front.decode[1], "arrived", id="c")
        await read_prompts(front, "d", "e")
        assert offers(front) == [[], []], "c took two of three pages there"
        assert [job.request.id for job in front.router.held] == ["d", "e"]
        front.room(front.decode[0], 0, 16, 2)
        assert offers(front) == [[], []], "it had not seen its two offers when it said so"
        front.room(front.decode[0], 2, 4, 1)
        assert offers(front) == [["d"], []], "one of them has ended"
        front.room(front.decode[1], 3, 4, 2)
        assert offers(front) == [[], ["e"]]

    run(test)


def test_a_full_queue_and_impossible_requests() -> None:
    async def test() -> None:
        front = Front()
        for i in range(8):
            front.ask(str(i))
        with pytest.raises(Busy, match=r"8 requests .* at most 8"):
            front.ask("more")
        front.router.cancel(["5", "0"])
        assert [m["id"] for m in front.prefill[0].take("cancel")] == ["0"]
        assert [m["request"]["id"] for m in front.prefill[0].take("add")] == ["0", "1", "2"]
        with pytest.raises(Refused, match="cache of 64 tokens"):
            front.ask("long", 60, 20)

    run(test)


def test_who_dies_fails_what_it_held_and_nothing_else() -> None:
    async def test() -> None:
        front = Front()
        queues = {id: front.ask(id) for id in "ab"}
        for id in "ab":
            front.made(front.prefill[0], id, [66])
        (first,), (second,) = offers(front)
        front.say(front.decode[0], "arrived", id=first)
        third = front.ask("c")
        front.made(front.decode[0], first, [67])
        front.router.left(front.decode[0])  # type: ignore[arg-type]
        await asyncio.sleep(0)
        texts = [queues[first].get_nowait() for _ in range(3)]
        assert [t.text for t in texts] == ["B", "C", ""]
        assert texts[2].error == "the decode process 0 that held this request has died"
        assert [m["link"][:3] for m in front.prefill[0].take("unlink")] == ["0-0"]
        front.made(front.prefill[0], "c", [66])
        assert [m["request"]["id"] for m in front.decode[1].take("offer")] == ["c"]
        front.router.left(front.prefill[0])  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert "prefill process 0" in str(queues[second].get_nowait().error or queues[second].get_nowait().error)
        assert "prefill process 0" in str([third.get_nowait() for _ in range(2)][1].error)
        assert {m["id"] for m in front.decode[1].take("cancel")} == {second, "c"}
        assert front.router.counts == {"decode losses": 1, "prefill losses": 1, "lost requests": 3, "hand-overs": 1,
                                       "hand-over tokens": 6}  # fmt: skip
        assert front.router.failed == "no prefill process is there; it is being started"
        front.ask("d")
        again = front.join("prefill", 0)
        assert [m["request"]["id"] for m in again.take("add")] == ["d"]
        assert front.router.failed is None

    run(test)


def test_a_broken_link_fails_what_was_on_it_and_is_made_again() -> None:
    async def test() -> None:
        front = Front(decode=1)
        queues = {id: front.ask(id) for id in "ab"}
        front.made(front.prefill[0], "a", [66])
        front.say(front.decode[0], "arrived", id="a")
        front.made(front.prefill[0], "b", [66])
        link = front.decode[0].take("offer")[0]["link"]
        for peer in (front.decode[0], front.prefill[0]):
            front.say(peer, "broken", link=link, reason="x")
        front.made(front.decode[0], "a", [66], "length")
        await asyncio.sleep(AGAIN_SECONDS * 1.2)
        assert "the link from prefill process 0 to decode process 0 broke" in [queues["b"].get_nowait().error
                                                                              for _ in range(2)]  # fmt: skip
        assert [queues["a"].get_nowait().finish for _ in range(2)] == [None, "length"]
        assert len(front.decode[0].take("connect")) == 1

    run(test)


def test_only_those_who_know_the_key_are_let_in() -> None:
    class Listener:
        def __init__(self) -> None:
            self.hellos: list[Message] = []

        def joined(self, peer: Any, hello: Message) -> None:
            self.hellos.append(hello)
            peer.send({"kind": "welcome"})

        def received(self, peer: Any, message: Message) -> None:
            self.hellos.append(message)

        def left(self, peer: Any, fate: str) -> None:
            self.hellos.append({"left": fate})

    async def test() -> None:
        listener = Listener()
        server = await wire.listen("127.0.0.1", 0, "sesame", listener)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(NotTrusted, match="does not know the key"):
            await asyncio.to_thread(Channel, "127.0.0.1", port, "open", {})

        def guess() -> bytes:
            with socket.create_connection(("127.0.0.1", port)) as line:
                line.sendall(json.dumps({"challenge": "x"}).encode() + b"\n")
                line.recv(1000)
                line.sendall(json.dumps({"proof": "0" * 64, "side": "decode"}).encode() + b"\n")
                return line.recv(1000)

        assert await asyncio.to_thread(guess) == b""
        assert not listener.hellos
        channel = await asyncio.to_thread(Channel, "127.0.0.1", port, "sesame", {"side": "decode"})
        assert await asyncio.to_thread(channel.inbox.get) == {"kind": "welcome"}
        channel.send({"kind": "step"})
        await asyncio.sleep(0.1)
        assert listener.hellos == [{"side": "decode"}, {"kind": "step"}]
        server.close()

    run(test)


class Fates:
    """Hears who came and what became of them."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def joined(self, peer: Any, hello: Message) -> None:
        self.heard.append(hello["side"])

    def received(self, peer: Any, message: Message) -> None:
        self.heard.append(message["kind"])

    def left(self, peer: Any, fate: str) -> None:
        self.heard.append(fate)


@pytest.mark.alone
def test_an_engine_that_gives_no_sign_of_life_is_lost() -> None:
    """Its connection is as it was; one that has nothing to say, but lives, stays."""

    def mute(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as line, line.makefile("rb") as lines:
            line.sendall(b'{"challenge": "x"}\n')
            proof = wire._proof("sesame", "engine", json.loads(lines.readline())["challenge"])
            line.sendall(json.dumps({"side": "mute", "proof": proof}).encode() + b"\n")
            return lines.readlines()[-1]

    async def test() -> None:
        fates = Fates()
        server = await wire.listen("127.0.0.1", 0, "sesame", fates, silence=0.4)
        port = server.sockets[0].getsockname()[1]
        channel = await asyncio.to_thread(Channel, "127.0.0.1", port, "sesame", {"side": "quiet"}, 0.4)
        with suppress(ConnectionError):
            assert json.loads(await asyncio.to_thread(mute, port)) == wire.ALIVE
        await asyncio.sleep(1)
        assert fates.heard == ["quiet", "mute", "has given no sign of life for 0.4 s"]
        assert channel.inbox.empty(), "signs of life are not messages"
        server.close()

    run(test)


@pytest.mark.alone
def test_a_front_that_gives_no_sign_of_life_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:

        def mute() -> socket.socket:
            line, _ = server.accept()
            challenge = json.loads(line.makefile("rb").readline())["challenge"]
            proof = wire._proof("sesame", "front", challenge)
            line.sendall(json.dumps({"proof": proof, "challenge": "y"}).encode() + b"\n")
            return line

        accepted = pool.submit(mute)
        channel = Channel("127.0.0.1", server.getsockname()[1], "sesame", {"side": "decode"}, silence=0.4)
        with accepted.result():
            assert channel.inbox.get(timeout=20) == wire.GONE


def test_requests_survive_the_wire() -> None:
    request = Request("a", (1, 2), 3, GREEDY, 256)
    assert decode_request(json.loads(json.dumps(encode_request(request)))) == request
