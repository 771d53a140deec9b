"""The engine's thread when experts are shared: it steps with the other ranks, whether it has requests or not."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from serving.engine import Engine
from serving.expert_metrics import expert_metrics
from serving.expert_parallel import ExpertParallel
from serving.tokenizers import Tokenizer
from serving.worker import Worker

PATIENCE = 0.01  # seconds between two steps when nobody has work


class SharedWorker(Worker):
    """on_end: called in the thread when serving has ended, because somebody wanted it or because a rank is gone."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, on_end: Callable[[], None]) -> None:
        super().__init__(engine, tokenizer)
        if engine.experts is None:
            raise ValueError("this engine shares no experts")
        self._experts: ExpertParallel = engine.experts
        self._on_end = on_end

    async def stop(self) -> None:
        """End the threads of all ranks after the same step."""
        self._commands.put(self._experts.leave)
        await asyncio.to_thread(self._thread.join)

    def more_metrics(self) -> Iterator[Any]:
        yield from expert_metrics(self._experts.state())

    @property
    def _ended(self) -> bool:
        return self._experts.ended

    def _run(self) -> None:
        super()._run()
        self._on_end()

    def _obey(self) -> None:
        if self._experts.quiet:
            with suppress(queue.Empty):
                self._commands.get(timeout=PATIENCE)()
        while not self._commands.empty():
            self._commands.get()()
