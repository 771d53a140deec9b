"""The thread that runs the engine, and its mailbox: requests go in from an event loop, text comes back to it."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from serving.engine import Busy, Engine
from serving.sequence import STOP, Request
from serving.text import TextStream
from serving.tokenizers import Tokenizer


class EngineFailed(RuntimeError):
    """The engine has broken down; the server must be started again."""


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
    """Called in the engine's thread with seconds: of the first token of a request, and between later ones."""

    first_token: Callable[[float], None] = lambda seconds: None
    between_tokens: Callable[[float], None] = lambda seconds: None


class Worker:
    """`failed` says why the engine broke down; None while all is well."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.listeners = Listeners()
        self.failed: str | None = None
        self._calls: dict[str, Call] = {}
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- for the event loop --------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step."""
        self._ending = True
        self._commands.put(lambda: None)
        self._thread.join()

    def submit(self, requests: Sequence[Request], stop: Sequence[str]) -> asyncio.Queue[Delta]:
        """Send in the requests of one call; their deltas come through the queue, each until its `finish` or `error`.

        Raises Refused if one can never be served, Busy if there are too many, EngineFailed.
        """
        if self.failed is not None:
            raise EngineFailed(self.failed)
        for request in requests:
            self.engine.check(request)
        most = self.engine.scheduler.limits.most
        if len(self._calls) + len(requests) > most:
            raise Busy(f"{len(self._calls)} requests are running or waiting already, and at most {most} may")
        deltas: asyncio.Queue[Delta] = asyncio.Queue()
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        for index, request in enumerate(requests):
            call = Call(request, index, TextStream(self.tokenizer, stop), deltas, loop, now)
            self._calls[request.id] = call
            self._commands.put(lambda call=call: self._add(call))  # type: ignore[misc]
        if self.failed is not None:  # while these were sent in, so nobody will read them
            raise EngineFailed(self.failed)
        return deltas

    def cancel(self, ids: Sequence[str]) -> None:
        """Nobody waits for these any more: their pages are free before the next step."""
        for id in ids:
            self._commands.put(lambda id=id: self._forget(id))  # type: ignore[misc]

    # -- in the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._ending:
                    self._obey()
                    for event in self.engine.step():
                        self._deliver(event.id, event.tokens, event.finish)
        except Exception:
            self.failed = traceback.format_exc()
        for call in list(self._calls.values()):
            reason = "the engine has broken down" if self.failed else "the server is shutting down"
            call.put(Delta(call.index, "", 0, error=reason))
        self._calls.clear()

    def _obey(self) -> None:
        """Carry out what was asked; wait for something to do if there is nothing to compute."""
        if self.engine.idle:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _add(self, call: Call) -> None:
        try:
            self.engine.add(call.request)
        except (ValueError, Busy) as error:
            self._calls.pop(call.request.id, None)
            call.put(Delta(call.index, "", 0, error=str(error)))

    def _forget(self, id: str) -> None:
        self.engine.cancel(id)
        self._calls.pop(id, None)

    def _deliver(self, id: str, tokens: Sequence[int], finish: str | None) -> None:
        call = self._calls[id]
        self._clock(call, len(tokens))
        text = call.text.push(tokens)
        if finish is not None:
            text += call.text.close()
        if call.text.stopped:
            finish = STOP
            self.engine.cancel(id)
        call.put(Delta(call.index, text, len(tokens), finish))
        if finish is not None:
            self._calls.pop(id)

    def _clock(self, call: Call, tokens: int) -> None:
        now = time.perf_counter()
        if call.latest is None:
            self.listeners.first_token(now - call.started)
        else:
            for _ in range(tokens):
                self.listeners.between_tokens((now - call.latest) / tokens)
        if tokens:
            call.latest = now
