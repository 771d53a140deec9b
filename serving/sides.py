"""The two halves of an engine, for prefill and decode in separate processes.

    PrefillEngine   reads prompts and makes the first token; then a sequence is parked with its pages until it leaves
    DecodeEngine    takes in sequences whose prompts were read elsewhere, and makes the other tokens

Between them travels a sequence's part of the latent cache (handover.py). The pages of the two sides have nothing to do
with each other: sizes and numbers may differ. With drafts the MTP module's layer is one of the layers; a draft that was
made beside the first token stays behind.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence as Many
from typing import Any

from serving.admission import check_prompt_cache, check_request
from serving.engine import Engine, Event
from serving.sequence import Request, Sequence


class PrefillEngine(Engine):
    """parked: sequences with their first token, by id. They keep their pages, so a full decode side ends admission."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """As `Engine`."""
        super().__init__(*arguments, **options)
        self.parked: dict[str, Sequence] = {}
        self._lock = threading.Lock()  # for who gets a parked sequence: `leave` comes from another thread

    def check(self, request: Request) -> None:
        check_request(request, self.decoder.config.vocab_size, self.max_length)
        check_prompt_cache(request, self.pool.total * self.pool.size, self.pool.size)

    @property
    def idle(self) -> bool:
        return not (self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[Event]:
        """As `Engine.step`. A sequence that does not end with its first token is parked.

        After a step that failed it may have lost its pages: then its tokens are told when it has been read again.
        """
        events: dict[str, Event] = {}
        for event in super().step():  # two of one request if the step before has failed after its first token
            before = events[event.id].tokens if event.id in events else ()
            events[event.id] = Event(event.id, (*before, *event.tokens), event.finish)
        told: list[Event] = []
        for event in events.values():
            if event.finish is None:
                sequence = self._sequences[event.id]
                if sequence.pending > 1:
                    self._events.append(event)
                    continue
                self.scheduler.running.remove(sequence)
                sequence.draft = None
                self.parked[event.id] = sequence
            told.append(event)
        return told

    def cancel(self, id: str) -> None:
        with self._lock:
            self.parked.pop(id, None)
            super().cancel(id)

    def leave(self, id: str) -> Sequence | None:
        """A parked sequence, which from now on belongs to the caller (`release`); None if it was cancelled."""
        with self._lock:
            sequence = self.parked.pop(id, None)
            if sequence is not None:
                self._sequences.pop(id)
        return sequence

    def release(self, sequence: Sequence) -> None:
        """Its cache has been sent, or nobody wants it any more."""
        self.pool.give(sequence.drop_pages())


class DecodeEngine(Engine):
    """reserved: sequences that have their pages here, and whose cache is on its way."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """As `Engine`."""
        super().__init__(*arguments, **options)
        self.reserved: list[Sequence] = []

    @property
    def places(self) -> int:
        """How many more sequences could be computed at once."""
        taken = len(self.scheduler.running) + len(self.scheduler.waiting) + len(self.reserved)
        return max(0, self.scheduler.limits.max_sequences - taken)

    def reserve(self, request: Request, made: Many[int]) -> Sequence | None:
        """Take pages for a prompt that was read elsewhere, and its first tokens; None if there is no room now.

        Whoever was preempted here comes first. Raises Refused for a request that can never be served here.
        """
        self.check(request)
        count = len(request.prompt) + len(made) - 1  # the newest token is not in the cache yet
        need = self.pool.pages_for(count + 1)
        if self.scheduler.waiting or not self.places or need > self.pool.free:
            return None
        sequence = Sequence(request, [*request.prompt, *made], cached=count)
        sequence.add_pages(self.pool.take(need), self.pool.size)
        self.reserved.append(sequence)
        return sequence

    def adopt(self, sequence: Sequence) -> None:
        """A reserved sequence whose cache has arrived; from the next step on it is computed."""
        self.reserved.remove(sequence)
        self._sequences[sequence.request.id] = sequence
        self.scheduler.running.append(sequence)

    def release(self, sequence: Sequence) -> None:
        """A reserved sequence that will not come, or that nobody wants any more."""
        self.reserved.remove(sequence)
        self.pool.give(sequence.drop_pages())
