"""What is computed in each step: continuous batching with chunked prefill, admission and preemption.

A step has a budget of tokens. Sequences that only need their next token come first, so a long prompt never holds them
up; what is left of the budget reads prompts, in pieces, oldest first. New sequences are admitted in the order in which
they came while there are pages for what they will read in this step. When a running sequence needs a page and there
is none, the youngest one gives up its pages and waits at the head of the queue, to be read again from its beginning:
what it had made is kept. The oldest sequence is never the victim of another, and no request is taken that could not run
alone, so every sequence ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from serving.pages import PagePool
from serving.sequence import Sequence


@dataclass(frozen=True)
class Limits:
    """max_sequences: running at once. batch_tokens: per step. waiting: requests in a full queue."""

    max_sequences: int = 16
    batch_tokens: int = 512
    waiting: int = 1024

    @property
    def most(self) -> int:
        """Requests that may be here at once."""
        return self.max_sequences + self.waiting

    def check(self, drafts: bool) -> None:
        """Raise ValueError for limits under which nothing could run."""
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        least = self.max_sequences * (2 if drafts else 1)
        if self.batch_tokens < least:
            what = "a token and a draft" if drafts else "a token"
            raise ValueError(
                f"batch_tokens={self.batch_tokens} must be at least {least}: each of {self.max_sequences} sequences "
                f"reads {what} in a step"
            )


@dataclass(frozen=True)
class Work:
    """The next `count` tokens of a sequence; with its draft, if it has one, after the last of its tokens."""

    sequence: Sequence
    count: int

    @property
    def at_end(self) -> bool:
        """Whether a new token can be made after this."""
        return self.sequence.cached + self.count >= len(self.sequence.tokens)

    @property
    def has_draft(self) -> bool:
        return self.sequence.cached + self.count > len(self.sequence.tokens)

    @property
    def read(self) -> list[int]:
        s = self.sequence
        tokens = s.tokens[s.cached : s.cached + self.count]
        if len(tokens) < self.count and s.draft is not None:
            tokens.append(s.draft.token)
        return tokens


class Scheduler:
    """running is in order of admission. preemptions: how often a sequence had to give up its pages."""

    def __init__(self, pool: PagePool, limits: Limits) -> None:
        self.pool, self.limits = pool, limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def plan(self) -> list[Work]:
        """The work of the next step, with pages for all of it."""
        budget = self.limits.batch_tokens
        work: list[Work] = []
        for sequence in sorted(self.running, key=lambda s: s.pending > 1):
            if sequence not in self.running:  # it was preempted for one before it
                continue
            count = min(self._wanted(sequence), budget)
            if count and self._make_room(sequence, count, work):
                work.append(Work(sequence, count))
                budget -= count
        while self.waiting and budget and len(self.running) < self.limits.max_sequences:
            sequence = self.waiting[0]
            count = min(self._wanted(sequence), budget)
            if self.pool.pages_for(count) > self.pool.free:
                break
            self.running.append(self.waiting.popleft())
            self._add_pages(sequence, count)
            work.append(Work(sequence, count))
            budget -= count
        return work

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or nobody wants it any more: its pages are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.pool.give(sequence.drop_pages())

    def _wanted(self, sequence: Sequence) -> int:
        return sequence.pending + (sequence.draft is not None)

    def _make_room(self, sequence: Sequence, count: int, work: list[Work]) -> bool:
        """Pages for so many more tokens, if need be from the youngest; False if that is the sequence itself."""
        while self._missing(sequence, count) > self.pool.free:
            victim = self.running.pop()
            self.pool.give(victim.drop_pages())
            self.waiting.appendleft(victim)
            self.preemptions += 1
            work[:] = [w for w in work if w.sequence is not victim]
            if victim is sequence:
                return False
        self._add_pages(sequence, count)
        return True

    def _missing(self, sequence: Sequence, count: int) -> int:
        return max(0, self.pool.pages_for(sequence.cached + count) - len(sequence.pages))

    def _add_pages(self, sequence: Sequence, count: int) -> None:
        sequence.add_pages(self.pool.take(self._missing(sequence, count)), self.pool.size)
