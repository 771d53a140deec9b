"""GPipe: all forwards, then all backwards. The simplest schedule; every activation of the batch is alive at once.

Rank r holds stage r. The bubble is that of 1F1B, (PP − 1)·(F + B), but a rank keeps M activations, not at most PP.
"""

from __future__ import annotations

from dualpipe.schedule import Action, Kind, Schedule


def gpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Generate GPipe. Raises ValueError without a rank or a micro-batch."""
    if num_ranks < 1 or num_micro_batches < 1:
        raise ValueError(f"GPipe needs at least 1 rank and 1 micro-batch; got {num_ranks} and {num_micro_batches}")
    rows = tuple(
        tuple(Action(kind, rank, m) for kind in (Kind.F, Kind.B) for m in range(num_micro_batches))
        for rank in range(num_ranks)
    )
    return Schedule("gpipe", num_micro_batches, (tuple(range(num_ranks)),), rows)
