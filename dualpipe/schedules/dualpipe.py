"""DualPipe: micro-batches enter at both ends, and each forward chunk hides a backward chunk (report 3.2.1).

Rank r holds stage r for direction 0 and stage PP-1-r for direction 1, so two ranks mirror each other and the
schedule is symmetric. Seen from one rank, *near* is the direction that enters on its side of the pipeline and
*far* the other one. Its work is eight phases; `half` is the distance to the near end, H = PP/2 and n = M/2:

  1  F near                                        2·(H − half − 1) times
  2  F near, F far                                 half + 1
  3  I far, W far, F far                           H − half − 1        W fills the wait for the next F
  4  pair(F near, B far), pair(F far, B near)      n − PP + half + 1   the steady state: all communication hidden
  5  B far, pair(F far, B near)                    H − half − 1
  6  B far, B near                                 half + 1            the later half split into I, W left for later
  7  W, I near                                     H − half − 1
  8  W                                             what is left

The bubble is (PP/2 − 1)·(F&B + B − 3W). Parameters are held twice; at most PP + 1 activations live at a time.
"""

from __future__ import annotations

from collections import deque

from dualpipe.schedule import Action, Kind, Pair, Schedule, Step


def dualpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Generate DualPipe. Raises ValueError unless PP and M are even and M ≥ 2·PP (PP = 1 takes any even M ≥ 2)."""
    if num_ranks != 1 and (num_ranks < 1 or num_ranks % 2):
        raise ValueError(f"DualPipe needs an even number of ranks; got {num_ranks}")
    if num_micro_batches % 2 or num_micro_batches < 2 * num_ranks:
        raise ValueError(
            f"DualPipe on {num_ranks} ranks needs an even number of micro-batches, at least {2 * num_ranks}; "
            f"got {num_micro_batches}"
        )
    last = num_ranks - 1
    placement = (tuple(range(num_ranks)), tuple(range(last, -1, -1)))
    if num_ranks == 1:
        return Schedule("dualpipe", num_micro_batches, placement, (_single(num_micro_batches),))
    rows = tuple(_rank(rank, num_ranks, num_micro_batches) for rank in range(num_ranks))
    return Schedule("dualpipe", num_micro_batches, placement, rows)


class _Writer:
    """Writes one rank's row: numbers the micro-batches of each direction and remembers the deferred W."""

    def __init__(self, stages: tuple[int, int], first_micro_batch: tuple[int, int]) -> None:
        self.stages = stages
        self.next = {Kind.F: list(first_micro_batch), Kind.B: list(first_micro_batch)}
        self.deferred: deque[Action] = deque()
        self.row: list[Step] = []

    def _take(self, kind: Kind, side: int) -> Action:
        counter = self.next[Kind.F if kind is Kind.F else Kind.B]
        action = Action(kind, self.stages[side], counter[side])
        counter[side] += 1
        return action

    def f(self, side: int) -> None:
        self.row.append(self._take(Kind.F, side))

    def b(self, side: int) -> None:
        self.row.append(self._take(Kind.B, side))

    def i(self, side: int) -> None:
        action = self._take(Kind.I, side)
        self.deferred.append(Action(Kind.W, action.stage, action.micro_batch))
        self.row.append(action)

    def w(self) -> None:
        self.row.append(self.deferred.popleft())

    def pair(self, forward: int, backward: int) -> None:
        self.row.append(Pair(self._take(Kind.F, forward), self._take(Kind.B, backward)))


def _rank(rank: int, num_ranks: int, num_micro_batches: int) -> tuple[Step, ...]:
    half_ranks, share = num_ranks // 2, num_micro_batches // 2
    mirrored = rank >= half_ranks
    half = num_ranks - 1 - rank if mirrored else rank
    middle = half == half_ranks - 1
    near, far = 0, 1
    # Sides are relative: on a mirrored rank, near is direction 1, whose micro-batches are numbered from M/2.
    out = _Writer((half, num_ranks - 1 - half), (share, 0) if mirrored else (0, share))

    for _ in range(2 * (half_ranks - half - 1)):  # phase 1
        out.f(near)
    for _ in range(half + 1):  # phase 2
        out.f(near)
        out.f(far)
    for _ in range(half_ranks - half - 1):  # phase 3
        out.i(far)
        out.w()
        out.f(far)
    for turn in range(share - num_ranks + half + 1):  # phase 4
        if turn == 0 and middle:
            # The two middle ranks start the steady state; overlapping here would make their neighbours wait.
            out.f(near)
            out.b(far)
        else:
            out.pair(near, far)
        out.pair(far, near)
    for _ in range(half_ranks - half - 1):  # phase 5
        out.b(far)
        out.pair(far, near)
    for count in range(2 * (half + 1)):  # phase 6
        side = far if count % 2 == 0 else near
        (out.b if count < half + 1 else out.i)(side)
    for _ in range(half_ranks - half - 1):  # phase 7
        out.w()
        out.i(near)
    while out.deferred:  # phase 8
        out.w()
    return tuple(out.row)


def _single(num_micro_batches: int) -> tuple[Step, ...]:
    """One rank: no pipeline, but every forward still hides a backward of the other direction."""
    share = num_micro_batches // 2
    out = _Writer((0, 0), (0, share))
    out.f(0)
    for turn in range(num_micro_batches - 1):
        out.pair((turn + 1) % 2, turn % 2)
    out.b((num_micro_batches - 1) % 2)
    return tuple(out.row)
