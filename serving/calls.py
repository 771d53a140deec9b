"""Requests under way, as a server sees them: tokens come from an engine, text goes to whoever waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.sequence import STOP, Request
from serving.text import TextStream
from serving.tokenizers import Tokenizer


@dataclass(frozen=True)
class Delta:
    """What is new of one request. index: of its choice among those of a call. tokens: how many were made for it."""

    index: int
    text: str
    tokens: int
    finish: str | None = None
    error: str | None = None


@dataclass
class Call:
    """Where the text of one request goes. started: when it was sent in; latest: when its last token came (seconds)."""

    request: Request
    index: int
    text: TextStream
    deltas: asyncio.Queue[Delta]
    loop: asyncio.AbstractEventLoop
    started: float
    latest: float | None = None

    def put(self, delta: Delta) -> None:
        self.loop.call_soon_threadsafe(self.deltas.put_nowait, delta)


@dataclass
class Listeners:
    """Called with seconds: of the first token of a request, and between later ones."""

    first_token: Callable[[float], None] = lambda seconds: None
    between_tokens: Callable[[float], None] = lambda seconds: None


class Calls:
    """By the ids of their requests. Opened in an event loop; the rest may be called in any one thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.listeners = Listeners()
        self._tokenizer = tokenizer
        self._calls: dict[str, Call] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, id: str) -> bool:
        return id in self._calls

    def open(self, requests: Sequence[Request], stop: Sequence[str]) -> asyncio.Queue[Delta]:
        """Register the requests of one HTTP call; the deltas of all of them will come through the queue."""
        deltas: asyncio.Queue[Delta] = asyncio.Queue()
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        for index, request in enumerate(requests):
            text = TextStream(self._tokenizer, stop)
            self._calls[request.id] = Call(request, index, text, deltas, loop, now)
        return deltas

    def deliver(self, id: str, tokens: Sequence[int], finish: str | None) -> bool:
        """Pass new tokens on; True if a stop string has ended the request, so that its engine must be told."""
        call = self._calls[id]
        self._clock(call, len(tokens))
        text = call.text.push(tokens)
        if finish is not None:
            text += call.text.close()
        if call.text.stopped:
            finish = STOP
        call.put(Delta(call.index, text, len(tokens), finish))
        if finish is not None:
            self._calls.pop(id)
        return call.text.stopped

    def forget(self, id: str) -> None:
        self._calls.pop(id, None)

    def fail(self, id: str, reason: str) -> None:
        """End a request with an error; nothing happens if it has ended."""
        call = self._calls.pop(id, None)
        if call is not None:
            call.put(Delta(call.index, "", 0, error=reason))

    def fail_all(self, reason: str) -> None:
        for id in list(self._calls):
            self.fail(id, reason)

    def _clock(self, call: Call, tokens: int) -> None:
        now = time.perf_counter()
        if call.latest is None:
            self.listeners.first_token(now - call.started)
        else:
            for _ in range(tokens):
                self.listeners.between_tokens((now - call.latest) / tokens)
        if tokens:
            call.latest = now
