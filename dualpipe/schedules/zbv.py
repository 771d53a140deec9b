"""ZB-V: two stages per rank in a V and a split backward; nobody waits twice when F = I = W (Qi et al., 2024).

On R ranks there are 2·R stages; rank r holds stage r on the way *down* and stage 2R−1−r on the way *up*, so the last
rank turns a micro-batch around without a message, and rank 0 holds both the input and the loss. Seen from rank r:

  1  F down                                   2·(R − r) − 1
  2  F up, F down                             r
  3  F up, I up, W up                         R − r
  4  F down, I down, W down, F up, I up, W up until all forwards are done: the steady state, nobody waits
  5  I down, I up                             r               the W are left for later
  6  I down, W                                R − r
  7  W                                        what is left

The only bubble left, at F = I = W, is the (R − 1)·F that the first micro-batch takes to reach the last rank. A rank
keeps at most 2·R activations of a stage alive, which is the memory of 1F1B on R stages twice as thick.
"""

from __future__ import annotations

from collections import deque

from dualpipe.schedule import Action, Kind, Schedule
from dualpipe.schedules.dualpipev import v_placement


def zbv(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Generate ZB-V for any M ≥ 1. Raises ValueError without a rank or a micro-batch."""
    if num_ranks < 1 or num_micro_batches < 1:
        raise ValueError(f"ZB-V needs at least 1 rank and 1 micro-batch; got {num_ranks} and {num_micro_batches}")
    # Fewer than 2R−1 micro-batches do not fill the V. The plan for 2R−1, less what is too much, is still a plan.
    planned = max(num_micro_batches, 2 * num_ranks - 1)
    rows = tuple(
        tuple(a for a in _rank(rank, num_ranks, planned) if a.micro_batch < num_micro_batches)
        for rank in range(num_ranks)
    )
    return Schedule("zbv", num_micro_batches, (v_placement(num_ranks),), rows)


class _Writer:
    """Writes one rank's row: numbers the micro-batches of each stage and remembers the deferred W."""

    def __init__(self, down: int, up: int) -> None:
        self.down, self.up = down, up
        self.count = {(kind, stage): 0 for kind in (Kind.F, Kind.I) for stage in (down, up)}
        self.deferred: deque[Action] = deque()
        self.row: list[Action] = []

    def f(self, stage: int) -> None:
        self._take(Kind.F, stage)

    def i(self, stage: int) -> None:
        self.deferred.append(Action(Kind.W, stage, self._take(Kind.I, stage)))

    def w(self) -> None:
        self.row.append(self.deferred.popleft())

    def _take(self, kind: Kind, stage: int) -> int:
        micro_batch = self.count[kind, stage]
        self.count[kind, stage] += 1
        self.row.append(Action(kind, stage, micro_batch))
        return micro_batch


def _rank(rank: int, num_ranks: int, num_micro_batches: int) -> list[Action]:
    down, up = rank, 2 * num_ranks - 1 - rank
    out = _Writer(down, up)
    for _ in range(2 * (num_ranks - rank) - 1):  # phase 1
        out.f(down)
    for _ in range(rank):  # phase 2
        out.f(up)
        out.f(down)
    for _ in range(num_ranks - rank):  # phase 3
        out.f(up)
        out.i(up)
        out.w()
    while out.count[Kind.F, up] < num_micro_batches:  # phase 4
        if out.count[Kind.F, down] < num_micro_batches:
            out.f(down)
        out.i(down)
        out.w()
        out.f(up)
        out.i(up)
        out.w()
    for _ in range(rank):  # phase 5
        out.i(down)
        out.i(up)
    for _ in range(num_ranks - rank):  # phase 6
        out.i(down)
        out.w()
    while out.deferred:  # phase 7
        out.w()
    return out.row
