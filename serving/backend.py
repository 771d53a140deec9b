"""What the web application needs of whoever computes: one engine in a thread (worker.py), or processes (router.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from serving.calls import Delta, Listeners
from serving.engine import Engine
from serving.sequence import Request
from serving.tokenizers import Tokenizer


class EngineFailed(RuntimeError):
    """Whoever computed a request, or should compute it, has broken down."""


@dataclass(frozen=True)
class EngineState:
    """What there is to say of an engine now, and what it did since it was made (engine.Counters), as plain numbers.

    cache_tokens, cache_used: that fit, and of the pages in use. loads: tokens by layer and expert. Of shared experts:
    swaps, copies exchanged; rank_imbalance by layer, maximum over mean of what ranks computed, when last measured.
    """

    waiting: int = 0
    running: int = 0
    cache_tokens: int = 0
    cache_used: int = 0
    acceptance: float = 0.0
    steps: int = 0
    read: int = 0
    made: int = 0
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    swaps: int = 0
    loads: dict[str, list[int]] = field(default_factory=dict)
    rank_imbalance: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of(engine: Engine) -> EngineState:
        counters, scheduler, pool, experts = engine.counters, engine.scheduler, engine.pool, engine.experts
        return EngineState(
            waiting=len(scheduler.waiting), running=len(scheduler.running), cache_tokens=pool.total * pool.size,
            cache_used=pool.used * pool.size, acceptance=counters.acceptance, steps=counters.steps, read=counters.read,
            made=counters.made, drafted=counters.drafted, accepted=counters.accepted,
            preemptions=scheduler.preemptions, swaps=0 if experts is None else experts.swapped,
            rank_imbalance={} if experts is None else experts.imbalance,
            loads={layer: load_E.tolist() for layer, load_E in engine.decoder.loads.items()},
        )  # fmt: skip


class Backend(Protocol):
    """failed: why nothing can be computed now, None while all is well. max_length: tokens of prompt and answer
    that the model serves and the cache holds.
    """

    listeners: Listeners

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def max_length(self) -> int: ...

    @property
    def failed(self) -> str | None: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def submit(self, requests: Sequence[Request], stop: Sequence[str]) -> asyncio.Queue[Delta]:
        """Send in the requests of one call; their deltas come through the queue, each until its `finish` or `error`.

        Raises Refused if one can never be served, Busy if there are too many, EngineFailed.
        """
        ...

    def cancel(self, ids: Sequence[str]) -> None:
        """Nobody waits for these any more: what they hold is free before the next step."""
        ...

    def states(self) -> Iterator[tuple[dict[str, str], EngineState]]:
        """Every engine, with the labels that tell it from the others; none if there is only one."""
        ...

    def more_metrics(self) -> Iterator[Any]:
        """Prometheus metrics that only this backend has."""
        ...
