"""The thread that runs the engine, and its mailbox: requests go in from an event loop, text comes back to it."""

from __future__ import annotations

import asyncio
import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from serving.admission import Busy
from serving.backend import EngineFailed, EngineState
from serving.calls import Calls, Delta, Listeners
from serving.engine import Engine
from serving.sequence import Request
from serving.tokenizers import Tokenizer


class Worker:
    """One engine as a backend of the web application (backend.py). `failed` says why the engine broke down."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.max_length = min(engine.max_length, engine.pool.total * engine.pool.size)
        self.failed: str | None = None
        self._calls = Calls(tokenizer)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- for the event loop --------------------------------------------------------------------------------------

    @property
    def listeners(self) -> Listeners:
        return self._calls.listeners

    @listeners.setter
    def listeners(self, listeners: Listeners) -> None:
        self._calls.listeners = listeners

    async def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its current step."""
        self._ending = True
        self._commands.put(lambda: None)
        await asyncio.to_thread(self._thread.join)

    def submit(self, requests: Sequence[Request], stop: Sequence[str]) -> asyncio.Queue[Delta]:
        if self.failed is not None:
            raise EngineFailed(self.failed)
        for request in requests:
            self.engine.check(request)
        most = self.engine.scheduler.limits.most
        if len(self._calls) + len(requests) > most:
            raise Busy(f"{len(self._calls)} requests are running or waiting already, and at most {most} may")
        deltas = self._calls.open(requests, stop)
        for request in requests:
            self._commands.put(lambda request=request: self._add(request))  # type: ignore[misc]
        if self.failed is not None:  # while these were sent in, so nobody will read them
            raise EngineFailed(self.failed)
        return deltas

    def cancel(self, ids: Sequence[str]) -> None:
        for id in ids:
            self._commands.put(lambda id=id: self._forget(id))  # type: ignore[misc]

    def states(self) -> Iterator[tuple[dict[str, str], EngineState]]:
        yield {}, EngineState.of(self.engine)

    def more_metrics(self) -> Iterator[Any]:
        yield from ()

    # -- in the thread -------------------------------------------------------------------------------------------

    @property
    def _ended(self) -> bool:
        return self._ending

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._ended:
                    self._obey()
                    for event in self.engine.step():
                        if self._calls.deliver(event.id, event.tokens, event.finish):
                            self.engine.cancel(event.id)
        except Exception:
            self.failed = traceback.format_exc()
        self._calls.fail_all("the engine has broken down" if self.failed else "the server is shutting down")

    def _obey(self) -> None:
        """Carry out what was asked; wait for something to do if there is nothing to compute."""
        if self.engine.idle:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _add(self, request: Request) -> None:
        try:
            self.engine.add(request)
        except (ValueError, Busy) as error:
            self._calls.fail(request.id, str(error))

    def _forget(self, id: str) -> None:
        self.engine.cancel(id)
        self._calls.forget(id)
