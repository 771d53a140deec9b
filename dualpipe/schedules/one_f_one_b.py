"""1F1B: fill the pipeline with forwards, alternate one forward and one backward, drain (PipeDream-flush).

Rank r holds stage r. It keeps PP − r activations alive, and waits (PP − 1)·(F + B) in all.
"""

from __future__ import annotations

from dualpipe.schedule import Action, Kind, Schedule, Step


def one_f_one_b(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Generate 1F1B. Raises ValueError if there are fewer micro-batches than ranks."""
    if num_ranks < 1 or num_micro_batches < num_ranks:
        raise ValueError(f"1F1B on {num_ranks} ranks needs at least {num_ranks} micro-batches; got {num_micro_batches}")
    rows = []
    for rank in range(num_ranks):
        warm_up = num_ranks - 1 - rank
        row: list[Step] = [Action(Kind.F, rank, m) for m in range(warm_up)]
        for m in range(num_micro_batches - warm_up):
            row += [Action(Kind.F, rank, warm_up + m), Action(Kind.B, rank, m)]
        row += [Action(Kind.B, rank, m) for m in range(num_micro_batches - warm_up, num_micro_batches)]
        rows.append(tuple(row))
    return Schedule("one_f_one_b", num_micro_batches, (tuple(range(num_ranks)),), tuple(rows))
