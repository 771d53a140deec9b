"""ZB1P, also called ZB-H1: 1F1B whose backward is split, so that W fills what would be idle (Qi et al., 2024).

Rank r holds stage r. It warms up with PP−1−r forwards and then repeats F, I, W, where W is that of the micro-batch r
turns ago: later ranks send their first input gradients up the pipeline without stopping for W. Because an
activation is needed until its W is over, every rank keeps the same PP activations that rank 0 keeps in 1F1B.
The bubble is (PP − 1)·(F + B − 2W).
"""

from __future__ import annotations

from dualpipe.schedule import Action, Kind, Schedule, Step


def zb1p(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Generate ZB1P. Raises ValueError if there are fewer micro-batches than ranks."""
    if num_ranks < 1 or num_micro_batches < num_ranks:
        raise ValueError(f"ZB1P on {num_ranks} ranks needs at least {num_ranks} micro-batches; got {num_micro_batches}")
    rows = tuple(_rank(rank, num_ranks, num_micro_batches) for rank in range(num_ranks))
    return Schedule("zb1p", num_micro_batches, (tuple(range(num_ranks)),), rows)


def _rank(rank: int, num_ranks: int, num_micro_batches: int) -> tuple[Step, ...]:
    warm_up = num_ranks - 1 - rank
    row: list[Step] = [Action(Kind.F, rank, m) for m in range(warm_up)]
    for turn in range(num_micro_batches):
        if warm_up + turn < num_micro_batches:
            row.append(Action(Kind.F, rank, warm_up + turn))
        row.append(Action(Kind.I, rank, turn))
        if turn >= rank:
            row.append(Action(Kind.W, rank, turn - rank))
    row += [Action(Kind.W, rank, m) for m in range(num_micro_batches - rank, num_micro_batches)]
    return tuple(row)
