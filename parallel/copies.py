"""Which copy of an expert computes a token: experts that live in several slots share their tokens out.

A rank has a number of slots, each with one expert; an expert may be in several (`placement.py` says why). The tokens
of one expert that leave a rank go to its copies in turn, and each rank begins with another copy, so that the copies
get equal shares however the tokens come.

Dynamic redundancy is a choice anew for every batch: of the copies that are there, only some are used, so that a rank
reads the weights of few experts, and those with the most tokens of this very batch have the most copies.

Shapes: T local tokens, K experts per token, E experts, C the most copies of any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Slots = tuple[tuple[int, ...], ...]  # of each rank, the expert in each of its slots; as many on every rank


@dataclass(frozen=True)
class CopyTable:
    """Where the copies of each expert are.

    slots      see Slots; the slots of all ranks are numbered through
    copies_E   how many of them are in use
    slots_EC   their numbers; what is beyond copies_E means nothing
    """

    slots: Slots
    copies_E: Tensor
    slots_EC: Tensor

    @staticmethod
    def of(slots: Slots, experts: int, device: torch.device | str = "cpu") -> CopyTable:
        """All copies in use. Raises ValueError if an expert has none, or if ranks have unequal numbers of slots."""
        per_rank = {len(rank) for rank in slots}
        if len(per_rank) != 1:
            raise ValueError(f"ranks must have equally many slots, not {sorted(per_rank)}")
        where: list[list[int]] = [[] for _ in range(experts)]
        for number, expert in enumerate(expert for rank in slots for expert in rank):
            where[expert].append(number)
        homeless = [expert for expert, found in enumerate(where) if not found]
        if homeless:
            raise ValueError(f"experts {homeless} are on no rank")
        return CopyTable._with(slots, where, device)

    @staticmethod
    def _with(slots: Slots, where: Sequence[Sequence[int]], device: torch.device | str) -> CopyTable:
        most = max(1, *map(len, where))
        padded = [[*found, *[0] * (most - len(found))] for found in where]
        copies = torch.tensor([len(found) for found in where], device=device)
        return CopyTable(slots, copies, torch.tensor(padded, device=device))

    @property
    def per_rank(self) -> int:
        return len(self.slots[0])

    def spread(self, experts_TK: Tensor, first: int) -> Tensor:
        """The slot [T, K] of each token's experts; an expert's first token here goes to its copy number `first`."""
        if self.slots_EC.shape[1] == 1:
            return self.slots_EC[:, 0][experts_TK]
        turn_TK = occurrences(experts_TK) + first
        return self.slots_EC[experts_TK, turn_TK % self.copies_E[experts_TK]]

    def narrowed(self, load_E: Sequence[int], most: int) -> CopyTable:
        """With only those copies in use that suit a batch: at most `most` experts on any rank, as even as can be.

        load_E   tokens of each expert in the batch, of all ranks; an expert without tokens keeps its copies, which
                 cost nothing
        Only where an expert has no copy on a rank with room, a rank gets more. A pure function, so ranks agree.
        """
        return CopyTable._with(self.slots, _choose(self, load_E, most), self.copies_E.device)


def occurrences(experts_TK: Tensor) -> Tensor:
    """[T, K]: how many earlier entries, row by row, name the same expert."""
    flat = experts_TK.flatten()
    order = flat.argsort(stable=True)
    found = flat[order]
    turns = torch.empty_like(flat)
    turns[order] = torch.arange(len(flat), device=flat.device) - torch.searchsorted(found, found)
    return turns.view(experts_TK.shape)


def _choose(table: CopyTable, load_E: Sequence[int], most: int) -> list[list[int]]:
    """The slots in use of each expert. First one copy each, then more for the heaviest as long as that helps."""
    where = [row[:count] for row, count in zip(table.slots_EC.tolist(), table.copies_E.tolist(), strict=True)]
    rank_of = [r for r, rank in enumerate(table.slots) for _ in rank]
    loads, room = [0.0] * len(table.slots), [most] * len(table.slots)
    chosen: list[list[int]] = [list(found) if not load else [] for found, load in zip(where, load_E, strict=True)]
    wanted = [e for e, load in enumerate(load_E) if load]
    for e in sorted(wanted, key=lambda e: (len({rank_of[s] for s in where[e]}), -load_E[e], e)):
        slot = min(where[e], key=lambda s: (room[rank_of[s]] <= 0, loads[rank_of[s]], s))
        chosen[e] = [slot]
        loads[rank_of[slot]] += load_E[e]
        room[rank_of[slot]] -= 1
    while True:
        better = _another_copy(where, rank_of, chosen, load_E, loads, room)
        if better is None:
            return chosen
        expert, slot = better
        before, after = (load_E[expert] / (len(chosen[expert]) + more) for more in (0, 1))
        for held in chosen[expert]:
            loads[rank_of[held]] += after - before
        loads[rank_of[slot]] += after
        room[rank_of[slot]] -= 1
        chosen[expert].append(slot)


def _another_copy(
    where: Sequence[Sequence[int]], rank_of: Sequence[int], chosen: Sequence[Sequence[int]], load_E: Sequence[int],
    loads: Sequence[float], room: Sequence[int],
) -> tuple[int, int] | None:  # fmt: skip
    """(expert, slot) of a copy that relieves the heaviest rank and leaves its own below that; the best one, or None."""
    hot = max(range(len(loads)), key=loads.__getitem__)
    best, lowest = None, loads[hot]
    for expert, slots in enumerate(chosen):
        if not load_E[expert] or all(rank_of[s] != hot for s in slots):
            continue
        share = load_E[expert] / (len(slots) + 1)
        relief = load_E[expert] / len(slots) - share
        for slot in where[expert]:
            rank = rank_of[slot]
            if slot in slots or room[rank] <= 0 or any(rank_of[s] == rank for s in slots):
                continue
            after = max(loads[hot] - relief, loads[rank] + share)
            if after < lowest:
                best, lowest = (expert, slot), after
    return best
