"""The engine: requests go in, tokens come out, a step at a time. One thread, no clock, no text.

    step = plan (scheduler.py) → one forward over all sequences (model/decode.py) → tokens → drafts of the next

What a sequence gets does not depend on who shares its steps, but for rounding: products of matrices of another height
may add up in another order, which moves logits in their last digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dualpipe.lanes import lanes_for
from model.decode import Decoder, Piece
from model.sampling import choose
from model.stage import ModelStage
from serving.admission import Busy, Refused, check_cache, check_request
from serving.drafts import propose, verify
from serving.micro_batches import halves
from serving.pages import PagePool
from serving.scheduler import Limits, Scheduler, Work
from serving.sequence import Request, Sequence

if TYPE_CHECKING:
    from serving.expert_parallel import ExpertParallel


@dataclass(frozen=True)
class CacheSize:
    """Pages of so many tokens."""

    pages: int = 256
    page_size: int = 16

    @property
    def tokens(self) -> int:
        return self.pages * self.page_size


@dataclass(frozen=True)
class Event:
    """New tokens of a request; finish is None while more will come, else "stop" or "length"."""

    id: str
    tokens: tuple[int, ...]
    finish: str | None = None


@dataclass
class Counters:
    """Since the engine was made. read: tokens of prompts, again for every preemption; made: new tokens."""

    steps: int = 0
    read: int = 0
    made: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """The share of drafts that were right."""
        return self.accepted / self.drafted if self.drafted else 0.0


class Engine:
    """max_length: the longest sequence, prompt and answer. drafts: guess with the first MTP module (drafts.py).

    experts   whose the model's routed experts are, if they are shared with other ranks: then all ranks step together
    """

    def __init__(
        self,
        model: ModelStage,
        max_length: int,
        cache: CacheSize | None = None,
        limits: Limits | None = None,
        drafts: bool = False,
        experts: ExpertParallel | None = None,
    ) -> None:
        cache, limits = cache or CacheSize(), limits or Limits()
        limits.check(drafts)
        self.max_length, self.drafts = max_length, drafts
        self.pool = PagePool(cache.pages, cache.page_size)
        self.scheduler = Scheduler(self.pool, limits)
        lanes = None if experts is None else lanes_for(torch.device(model.tools.device), overlap=True)
        self.decoder = Decoder(model, cache.tokens, drafts, None if lanes is None else lanes.start)
        self.experts = experts
        if experts is not None:
            experts.watch(self.decoder.loads)
        self.counters = Counters()
        self._sequences: dict[str, Sequence] = {}
        self._events: list[Event] = []  # that came of a step which then failed are those of the next

    @property
    def idle(self) -> bool:
        return not self._sequences

    def check(self, request: Request) -> None:
        """Raise Refused for a request that can never be served, saying why."""
        check_request(request, self.decoder.config.vocab_size, self.max_length)
        check_cache(request, self.pool.total * self.pool.size, self.pool.size)

    def add(self, request: Request) -> None:
        """Queue a request. Raises Refused (see `check`), or Busy if there are too many already."""
        self.check(request)
        if request.id in self._sequences:
            raise Refused(f"there is a request with the id {request.id!r} already")
        if len(self._sequences) >= self.scheduler.limits.most:
            raise Busy(f"{len(self._sequences)} requests are running or waiting already, and no more may")
        sequence = Sequence.of(request)
        self._sequences[request.id] = sequence
        self.scheduler.waiting.append(sequence)

    def cancel(self, id: str) -> None:
        """Forget a request and free its pages; nothing happens if it has ended."""
        sequence = self._sequences.pop(id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)
            self._events = [event for event in self._events if event.id != id]

    def step(self) -> list[Event]:
        """Compute one step; what came of it, at most one event per request.

        Raises RuntimeError if the experts are shared, and a rank is gone; a later step computes the same again.
        """
        work = self.scheduler.plan()
        most = 0 if self.experts is None else self.experts.begin(sum(w.count for w in work))
        if most or self.experts is None:
            self._compute(work, 2 if self._pays_in_two(most) else 1)
        events, self._events = self._events, []
        return events

    def _pays_in_two(self, rows: int) -> bool:
        """Whether a step in which the fullest rank has so many rows is two micro-batches."""
        least = 0 if self.experts is None else self.experts.settings.overlap_rows
        return 0 < least <= rows

    def _compute(self, work: list[Work], parts: int) -> None:
        """parts: micro-batches, the same number on all ranks that share experts."""
        if not work:
            if self.experts is not None:
                self.decoder.join(self.drafts, parts)
            return
        starts = [0, *accumulate(w.count for w in work)]
        before = [w.sequence.cached for w in work]
        hidden_TD, hidden_RD = self._forward(work, starts, parts)
        events = self._make_tokens(work, hidden_RD)
        self.counters.steps += 1
        for event in events:
            if event.finish is not None:
                self.scheduler.remove(self._sequences.pop(event.id))
        self._events += events
        if self.drafts:
            rows = [(w.sequence, start, cached) for w, start, cached in zip(work, starts, before, strict=False)]
            read = propose(self.decoder, hidden_TD, [row for row in rows if row[0].finish is None])
            if not read and self.experts is not None:
                self.decoder.join_draft()

    def _forward(self, work: list[Work], starts: list[int], parts: int) -> tuple[Tensor, Tensor]:
        """Hidden states of all rows, where drafts want them, and of the R rows after which tokens are made."""
        pieces = [Piece(w.read, w.sequence.slots[: w.sequence.cached + w.count]) for w in work]
        counts = [1 + w.has_draft if w.at_end else 0 for w in work]
        if parts == 1 and not self.drafts and self.experts is None:
            hidden_RD = self.decoder.forward(self.decoder.batch(pieces), wanted=self.decoder.wanted(pieces, counts))
            return hidden_RD, hidden_RD
        if parts == 1:
            hidden_TD = self.decoder.forward(self.decoder.batch(pieces))
        else:
            hidden_TD = self.decoder.forward_both([self.decoder.batch(h) if h else None for h in halves(pieces)])
        rows = [row for end, count in zip(starts[1:], counts, strict=True) for row in range(end - count, end)]
        return hidden_TD, hidden_TD[rows]

    def _make_tokens(self, work: list[Work], hidden_RD: Tensor) -> list[Event]:
        """Take note of what was read, and make the next tokens where all was; hidden_RD: after what they follow."""
        ready: list[tuple[Sequence, bool]] = []  # and whether it had a draft
        for w in work:
            s, has_draft, at_end = w.sequence, w.has_draft, w.at_end
            self.counters.read += w.count if s.pending > 1 else 0
            if at_end:
                ready.append((s, has_draft))
            s.cached = min(s.cached + w.count, len(s.tokens))
        if not ready:
            return []
        logits = self.decoder.logits(hidden_RD)
        sequences, indices = [s for s, _ in ready], [s.made for s, _ in ready]
        samplings = [s.request.sampling for s in sequences]
        drafts = [s.draft if has_draft else None for s, has_draft in ready]
        if any(draft is not None for draft in drafts):
            made = verify(logits, samplings, indices, drafts)
            self.counters.drafted += sum(draft is not None for draft in drafts)
            self.counters.accepted += sum(len(tokens) - 1 for tokens in made)
        else:
            made = [[token] for token in choose(logits, samplings, indices)]
        return [self._append(s, tokens) for s, tokens in zip(sequences, made, strict=True)]

    def _append(self, s: Sequence, tokens: list[int]) -> Event:
        """Every token but the last was a draft, and so is in the cache already."""
        s.draft = None
        first = len(s.tokens)
        for i, token in enumerate(tokens):
            if not s.append(token):
                break
            s.cached += i < len(tokens) - 1
        added = tuple(s.tokens[first:])
        self.counters.made += len(added)
        return Event(s.request.id, added, s.finish)
