"""A pipeline schedule as plain data: who does what, in which order.

Vocabulary. A *stage* is a contiguous slice of the model, a *micro-batch* one chunk of the batch. Per stage and
micro-batch there is one forward `F` and one backward, either whole (`B`) or in two parts: `I` for the gradient of
the inputs, which the previous stage waits for, and `W` for the gradient of the weights, which nobody waits for.
A *pair* is one F and one B of different micro-batches that run overlapped on one rank.

A bidirectional schedule has two *directions*: micro-batches of direction 0 enter at PP rank 0, those of direction
1 at the last rank. `placement[d][s]` is the rank that holds stage s for direction d. Micro-batches are numbered
globally; the first M/2 go in direction 0, the rest in direction 1.

The text form is the one of `torch.distributed.pipelining`: `0F3` is the forward of micro-batch 3 on stage 0, and
`(0F3;7B1)OVERLAP_F_B` a pair; one CSV row per rank, in which an empty cell means "nothing".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    F = "F"  # forward
    B = "B"  # whole backward: I, then W
    I = "I"  # backward for the inputs  # noqa: E741 - the literature's letter
    W = "W"  # backward for the weights

    __hash__ = str.__hash__  # Enum's own is written in Python, and actions are hashed all the time


class Action(NamedTuple):  # found in mappings all the time: a tuple's hash is not written in Python
    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.micro_batch}"


class Pair(NamedTuple):
    """One forward and one full backward of two different micro-batches, overlapped."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"


Step = Action | Pair
Placement = tuple[tuple[int, ...], ...]


def parts(step: Step) -> tuple[Action, ...]:
    """The actions inside a step: two for a pair, else one."""
    return (step.forward, step.backward) if isinstance(step, Pair) else (step,)


@dataclass(frozen=True)
class Schedule:
    """name, number of micro-batches, placement[direction][stage] = rank, steps[rank] = what it does, in order."""

    name: str
    num_micro_batches: int
    placement: Placement
    steps: tuple[tuple[Step, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.steps)

    @property
    def num_stages(self) -> int:
        return len(self.placement[0])

    @property
    def num_directions(self) -> int:
        return len(self.placement)

    def direction(self, micro_batch: int) -> int:
        """The direction in which a micro-batch travels: equal contiguous shares of 0..M-1."""
        return micro_batch * self.num_directions // self.num_micro_batches

    def rank_of(self, stage: int, micro_batch: int) -> int:
        return self.placement[self.direction(micro_batch)][stage]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, in increasing order, over all directions."""
        return tuple(sorted({s for row in self.placement for s, r in enumerate(row) if r == rank}))

    def actions(self, rank: int) -> Iterator[Action]:
        for step in self.steps[rank]:
            yield from parts(step)

    def forward_only(self) -> Schedule:
        """The same schedule without backwards, for evaluation."""
        rows = tuple(tuple(a for a in self.actions(r) if a.kind is Kind.F) for r in range(self.num_ranks))
        return replace(self, name=f"{self.name} (forward only)", steps=rows)

    def to_csv(self) -> str:
        return "\n".join(",".join(str(step) for step in row) for row in self.steps) + "\n"


_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")
_PAIR = re.compile(r"\((\d+F\d+);(\d+B\d+)\)OVERLAP_F_B")


def parse_action(text: str) -> Action:
    match = _ACTION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an action; write e.g. 0F3, 2I1, 2W1 or 1B0")
    return Action(Kind(match[2]), int(match[1]), int(match[3]))


def parse_step(text: str) -> Step:
    """Read one cell of the CSV form. Raises ValueError on anything else."""
    if not text.startswith("("):
        return parse_action(text)
    match = _PAIR.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a pair; write e.g. (0F3;7B1)OVERLAP_F_B")
    return Pair(parse_action(match[1]), parse_action(match[2]))
