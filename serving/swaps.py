"""From one placement of experts to another while the model runs, a few experts at a time.

`swaps` cuts the way into pieces after each of which every expert is somewhere. Most are one expert that takes the place
of a redundant copy; experts without copies that change their ranks make a piece together. `Mover` carries the weights
of one piece between ranks, in a thread of its own, over host memory and a process group of its own (gloo), while
steps go on. When all ranks have theirs, they exchange the slots' contents between the same two steps.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.copies import Slots
from serving.hosted_experts import SlotWeights


@dataclass(frozen=True)
class Write:
    """Slot `slot` of rank `rank` gets an expert, whose weights come from rank `source` (it may be the same)."""

    rank: int
    slot: int
    expert: int
    source: int


Swap = tuple[Write, ...]  # to be done at once


def arrange(current: Slots, ranks: Sequence[Sequence[int]]) -> Slots:
    """Slots that hold on each rank what a plan says, everything that is there already in its place."""
    result = []
    for held, wanted in zip(current, ranks, strict=True):
        left = Counter(wanted)
        kept: list[int | None] = []
        for expert in held:
            kept.append(expert if left[expert] > 0 else None)
            left[expert] -= left[expert] > 0
        new = iter(sorted(left.elements()))
        result.append(tuple(next(new) if expert is None else expert for expert in kept))
    return tuple(result)


def swaps(current: Slots, wanted: Slots) -> list[Swap]:
    """The way from one to the other: each slot that differs is written once, and no expert is ever without a slot."""
    state = [list(rank) for rank in current]
    copies = Counter(expert for rank in current for expert in rank)
    pending = {
        (r, s): new for r, rank in enumerate(wanted) for s, new in enumerate(rank) if new != current[r][s]
    }  # fmt: skip
    sent = [0] * len(current)
    found: list[Swap] = []
    while pending:
        places = _next(pending, state, copies)
        swap = []
        for r, s in places:
            expert = pending.pop((r, s))
            holders = [rank for rank, held in enumerate(state) if expert in held]
            source = r if r in holders else min(holders, key=sent.__getitem__)
            sent[source] += source != r
            swap.append(Write(r, s, expert, source))
        for w in swap:
            copies[state[w.rank][w.slot]] -= 1
            copies[w.expert] += 1
            state[w.rank][w.slot] = w.expert
        found.append(tuple(swap))
    return found


def _next(
    pending: Mapping[tuple[int, int], int], state: Sequence[Sequence[int]], copies: Mapping[int, int]
) -> list[tuple[int, int]]:
    """Places to write together: one if its old expert has other copies, else a chain until no expert is lost."""
    first = next((place for place in pending if copies[state[place[0]][place[1]]] > 1), next(iter(pending)))
    chain, after = [first], Counter(copies)
    while True:
        r, s = chain[-1]
        after[state[r][s]] -= 1
        after[pending[r, s]] += 1
        lost = next((e for r, s in chain if after[e := state[r][s]] == 0), None)
        if lost is None:
            return chain
        chain.append(next(place for place, new in pending.items() if new == lost and place not in chain))


class Mover:
    """Carries the weights of one swap of one layer. Failures of the thread are raised by `poll`.

    held       the weights in this rank's slots
    group      of all ranks, for this purpose alone; None if there is one
    """

    def __init__(self, swap: Swap, rank: int, held: Sequence[SlotWeights], experts: Sequence[int],
                 group: dist.ProcessGroup | None) -> None:  # fmt: skip
        self.swap, self._rank, self._group = swap, rank, group
        self._by_expert = dict(zip(experts, held, strict=True))
        self.arrived: dict[int, SlotWeights] = {}  # by slot
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="expert mover", daemon=True)
        self._thread.start()

    def poll(self) -> bool:
        """Whether everything of this rank has been sent and received. Raises RuntimeError if that failed."""
        if self._thread.is_alive():
            return False
        if self._failure is not None:
            raise RuntimeError(f"moving experts between ranks failed:\n{self._failure}")
        return True

    def _run(self) -> None:
        try:
            self._move()
        except Exception:
            self._failure = traceback.format_exc()

    @torch.no_grad()
    def _move(self) -> None:
        works: list[Any] = []
        landing, leaving = [], []
        for number, w in enumerate(self.swap):
            tags = range(2 * number, 2 * number + 2)
            if w.rank == self._rank and w.source == self._rank:
                self.arrived[w.slot] = self._by_expert[w.expert]
            elif w.rank == self._rank:
                new = _empty_like(next(iter(self._by_expert.values())))
                for tag, weight in zip(tags, new.parameters(), strict=True):
                    buffer = torch.empty(weight.shape, dtype=weight.dtype)
                    works.append(dist.irecv(_bytes(buffer), group=self._group, group_src=w.source, tag=tag))
                    landing.append((weight, buffer))
                self.arrived[w.slot] = new
            elif w.source == self._rank:
                for tag, weight in zip(tags, self._by_expert[w.expert].parameters(), strict=True):
                    leaving.append(_bytes(weight.detach().cpu()))
                    works.append(dist.isend(leaving[-1], group=self._group, group_dst=w.rank, tag=tag))
        for work in works:
            work.wait()
        for weight, buffer in landing:
            weight.copy_(buffer)


def _empty_like(weights: SlotWeights) -> SlotWeights:
    _, hidden, ffn = weights.down.shape
    return SlotWeights(hidden, ffn, weights.down.dtype, weights.down.device)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
