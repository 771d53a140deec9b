"""The front of a cluster of engine processes: who computes which request, and what becomes of it when a process dies.

    waiting ──► a prefill process reads it ──► held there, with its first token ──► a decode process makes the rest

A request waits here until a prefill process has a place for it, and is held there until a decode process has announced
pages and a place: a full decode side fills the prefill side, which fills the queue here, and a full queue refuses
(429). Requests go to whoever has the fewest tokens to look after. With processes that do both there is no hand-over.

When a process dies, what it held fails, and nothing else; a restarted one joins as if it were new.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from serving import wire
from serving.admission import Busy, check_cache, check_prompt_cache, check_request
from serving.backend import EngineState
from serving.calls import Calls, Delta, Listeners
from serving.cluster_metrics import cluster_metrics
from serving.cluster_options import DECODE, PREFILL, WHOLE, ClusterOptions
from serving.members import Job, Member, Wiring, least_loaded
from serving.sequence import Request
from serving.sharing import Sharing
from serving.tokenizers import Tokenizer
from serving.wire import Message, Peer

AGAIN_SECONDS = 1.0  # until a link, or a group, that broke among processes who all live is made again


class Router:
    """A backend of the web application (backend.py); everything happens in its event loop.

    announce   told where engines can join, "host port key", when that is possible
    complete   called once, when all processes are there and linked
    """

    def __init__(self, options: ClusterOptions, tokenizer: Tokenizer, vocabulary: int, max_length: int, host: str,
                 announce: Callable[[str], None], complete: Callable[[], None]) -> None:  # fmt: skip
        self.tokenizer, self.options = tokenizer, options
        self.max_length = min(max_length, options.cache_tokens // options.page_size * options.page_size)
        self.members: list[Member] = []
        self.counts: Counter[str] = Counter()  # losses by side, lost requests, hand-overs and their tokens
        self.waiting: deque[Job] = deque()
        self.held: deque[Job] = deque()
        self._vocabulary, self._longest, self._host, self._announce = vocabulary, max_length, host, announce
        self._complete: Callable[[], None] | None = complete
        self._calls = Calls(tokenizer)
        self._jobs: dict[str, Job] = {}
        self._wiring, self._sharing = Wiring(), Sharing(options)
        self._ending = False
        self._numbers = 0
        self._server: asyncio.Server | None = None

    # -- for the web application ---------------------------------------------------------------------------------

    @property
    def listeners(self) -> Listeners:
        return self._calls.listeners

    @listeners.setter
    def listeners(self, listeners: Listeners) -> None:
        self._calls.listeners = listeners

    @property
    def failed(self) -> str | None:
        o = self.options
        for side, wanted in ((PREFILL, o.prefill), (DECODE, o.decode), (WHOLE, o.together)):
            if wanted and not self._side(side):
                return f"no {side} process is there; it is being started"
        return None

    @property
    def most(self) -> int:
        """Requests that may be here at once."""
        o = self.options
        return o.waiting + o.prefill * o.prefill_sequences + (o.decode + o.together) * o.max_sequences

    async def start(self) -> None:
        key = secrets.token_hex()
        self._server = await wire.listen(self._host, 0, key, self, self.options.silence)
        port = self._server.sockets[0].getsockname()[1]
        await asyncio.to_thread(self._announce, f"{self._host} {port} {key}")

    async def stop(self) -> None:
        self._ending = True
        self._calls.fail_all("the server is shutting down")
        for member in self.members:
            member.peer.close()
        if self._server is not None:
            self._server.close()

    def submit(self, requests: Sequence[Request], stop: Sequence[str]) -> asyncio.Queue[Delta]:
        for request in requests:
            self._check(request)
        if len(self._jobs) + len(requests) > self.most:
            raise Busy(f"{len(self._jobs)} requests are running or waiting already, and at most {self.most} may")
        deltas = self._calls.open(requests, stop)
        for request in requests:
            job = self._jobs[request.id] = Job(request)
            self.waiting.append(job)
        self._pump()
        return deltas

    def cancel(self, ids: Sequence[str]) -> None:
        for id in ids:
            self._calls.forget(id)
            self._drop(id)
        self._pump()

    def states(self) -> Iterator[tuple[dict[str, str], EngineState]]:
        for member in sorted(self.members, key=lambda m: (m.side, m.index)):
            yield {"side": member.side, "process": str(member.index)}, member.state

    def more_metrics(self) -> Iterator[Any]:
        return cluster_metrics(self)

    # -- for the engines' connections (wire.Listener) ------------------------------------------------------------

    def joined(self, peer: Peer, hello: Message) -> None:
        member = Member(hello["side"], hello["index"], hello["pid"], peer)
        for old in [m for m in self.members if (m.side, m.index) == (member.side, member.index)]:
            self.left(old.peer)
        self.members.append(member)
        self._sharing.changed(self.members, member)

    def received(self, peer: Peer, message: Message) -> None:
        member = self._of(peer)
        if member is None:
            return
        kind = message["kind"]
        if kind == "step":
            self._step(member, message)
        elif kind == "ready":
            self._ready(member)
        elif kind == "apart":
            self._apart(member, message["group"])
        elif kind == "accepted":
            reader = self._wiring.reader(message["link"])
            if reader is not None:  # even for a request that nobody wants any more: somebody waits for its cache
                reader.peer.send({**message, "kind": "send"})
        elif kind == "arrived":
            self._arrived(message["id"])
        elif kind == "refused":
            self._fail(message["id"], message["reason"])
        elif kind == "linked":
            self._wiring.linked(member, message["link"])
        elif kind == "broken":
            self._broken(message["link"])
        self._pump()
        if self._complete is not None and self._is_complete():
            self._complete()
            self._complete = None

    def left(self, peer: Peer, fate: str = "has died") -> None:
        member = self._of(peer)
        if member is None:
            return
        self.members.remove(member)
        self._wiring.leave(member)
        if not self._ending:
            self._sharing.changed(self.members, member)
        if not self._ending:
            self.counts[f"{member.side} losses"] += 1
            self.counts["lost requests"] += len(member.jobs)
        for id in list(member.jobs):
            self._fail(id, f"the {member.name} that held this request {fate}")
        self._pump()

    # -- inside --------------------------------------------------------------------------------------------------

    def _of(self, peer: Peer) -> Member | None:
        return next((m for m in self.members if m.peer is peer), None)

    def _side(self, side: str) -> list[Member]:
        """Those of a side that can compute."""
        return [m for m in self.members if m.side == side and m.ready]

    def _is_complete(self) -> bool:
        o = self.options
        linked = (self._wiring.between(r, w) for r in self._side(PREFILL) for w in self._side(DECODE))
        return sum(m.ready for m in self.members) == o.prefill + o.decode + o.together and all(linked)

    def _check(self, request: Request) -> None:
        o = self.options
        check_request(request, self._vocabulary, self._longest)
        check_cache(request, o.cache_tokens // o.page_size * o.page_size, o.page_size)
        if o.prefill:
            check_prompt_cache(request, o.prefill_cache_tokens // o.prefill_page_size * o.prefill_page_size,
                               o.prefill_page_size)  # fmt: skip

    def _pump(self) -> None:
        """Move on whoever can."""
        while self.held and self._hand_over(self.held[0]):
            self.held.popleft()
        while self.waiting:
            o = self.options
            places = o.max_sequences if o.together else o.prefill_sequences
            reader = least_loaded(m for m in self.members if m.ready and m.reads and len(m.jobs) < places)
            if reader is None:
                return
            job = self.waiting.popleft()
            job.reader = reader
            reader.jobs[job.request.id] = job
            reader.peer.send({"kind": "add", "request": wire.encode_request(job.request)})

    def _hand_over(self, job: Job) -> bool:
        """Let its cache travel to the decode process with the most free pages; False if nobody has room for it."""
        assert job.reader is not None
        pages = -(-job.tokens // self.options.page_size)
        linked = {w: link for w in self._side(DECODE) if (link := self._wiring.between(job.reader, w))}
        fitting = [w for w in linked if w.room.free_places > 0 and w.room.free_pages >= pages]
        if not fitting:
            return False
        writer = max(fitting, key=lambda w: w.room.free_pages)
        self._numbers += 1
        job.writer, job.number = writer, self._numbers
        writer.jobs[job.request.id] = job
        writer.room.offer(job.number, pages)
        request = wire.encode_request(job.request)
        writer.peer.send({"kind": "offer", "request": request, "made": job.made, "number": job.number,
                          "link": linked[writer]})  # fmt: skip
        return True

    def _ready(self, member: Member) -> None:
        """It can compute, and from now on be linked; said again after every change of its group."""
        if not member.ready and member.side != WHOLE:
            for other in self._side(DECODE if member.side == PREFILL else PREFILL):
                self._wiring.connect(*((member, other) if member.side == PREFILL else (other, member)))
        member.ready = True

    def _apart(self, member: Member, group: str) -> None:
        """Its group failed. Mostly somebody was lost, and the next one is being made already; if not, make it."""

        def again() -> None:
            if member in self.members and self._sharing.name(member) == group:
                self._sharing.changed(self.members, member)

        asyncio.get_running_loop().call_later(AGAIN_SECONDS, again)

    def _step(self, member: Member, message: Message) -> None:
        """New tokens, and how things are there."""
        if message.get("room"):
            member.room.announce(message["room"])
        if "state" in message:
            member.state = EngineState(**message["state"])
        for id, tokens, finish in message["events"]:
            job = member.jobs.get(id)
            if job is None or id not in self._calls:  # the second: we are stopping
                continue
            stopped = self._calls.deliver(id, tokens, finish)
            if stopped and finish is None:
                self._drop(id)
            elif finish is not None:
                self._forget(job)
            elif member.side == PREFILL:
                job.made += tokens
                self.held.append(job)

    def _arrived(self, id: str) -> None:
        """The reader has nothing of it any more."""
        job = self._jobs.get(id)
        if job is not None and job.reader is not None:
            self.counts["hand-overs"] += 1
            self.counts["hand-over tokens"] += len(job.request.prompt)
            job.reader.jobs.pop(id, None)
            job.reader = None

    def _broken(self, name: str) -> None:
        """What was on its way through this link is lost; if both ends live, they get another one."""
        link = self._wiring.cut(name)
        if link is None:
            return
        for id, job in list(link.writer.jobs.items()):
            if job.reader is link.reader:
                self.counts["lost requests"] += 1
                self._fail(id, f"the link from {link.reader.name} to {link.writer.name} broke")

        def again() -> None:
            if link.reader in self.members and link.writer in self.members:
                self._wiring.connect(link.reader, link.writer)

        asyncio.get_running_loop().call_later(AGAIN_SECONDS, again)

    def _fail(self, id: str, reason: str) -> None:
        self._calls.fail(id, reason)
        self._drop(id)

    def _drop(self, id: str) -> None:
        """Nobody wants this any more: tell whoever holds it."""
        job = self._jobs.get(id)
        if job is None:
            return
        for holder in (job.reader, job.writer):
            if holder is not None:
                holder.peer.send({"kind": "cancel", "id": id})
        self._forget(job)

    def _forget(self, job: Job) -> None:
        id = job.request.id
        self._jobs.pop(id, None)
        for holder in (job.reader, job.writer):
            if holder is not None:
                holder.jobs.pop(id, None)
        for line in (self.waiting, self.held):
            if job in line:
                line.remove(job)
