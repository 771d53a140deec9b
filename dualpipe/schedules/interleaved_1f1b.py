"""Interleaved 1F1B: each rank holds several thinner stages, dealt out in turn (Megatron-LM, Narayanan et al., 2021).

With v chunks per rank there are v·R stages and stage s lives on rank s mod R, so a micro-batch travels round the
ranks v times. Forwards go R micro-batches at a time through chunk 0, then the same through chunk 1, and so on;
backwards in the same manner from the last chunk. The bubble is that of 1F1B divided by v; for that, a rank sends v
times as many messages, and keeps more activations: 2·(R − 1 − r) + (v − 1)·R + 1 stages' worth on rank r.
"""

from __future__ import annotations

from dualpipe.schedule import Action, Kind, Schedule


def interleaved_1f1b(num_ranks: int, num_micro_batches: int, chunks: int = 2) -> Schedule:
    """Generate interleaved 1F1B with `chunks` stages per rank. Raises ValueError if M < ranks or chunks < 1."""
    if num_ranks < 1 or num_micro_batches < num_ranks:
        raise ValueError(
            f"interleaved 1F1B on {num_ranks} ranks needs at least {max(num_ranks, 1)} micro-batches; "
            f"got {num_micro_batches}"
        )
    if chunks < 1:
        raise ValueError(f"interleaved 1F1B needs at least 1 chunk per rank; got chunks={chunks}")
    # Planned for whole groups of R micro-batches; the plan less what is too much is still a plan.
    planned = -(-num_micro_batches // num_ranks) * num_ranks
    rows = tuple(
        tuple(a for a in _rank(rank, num_ranks, planned, chunks) if a.micro_batch < num_micro_batches)
        for rank in range(num_ranks)
    )
    return Schedule("interleaved_1f1b", num_micro_batches, (tuple(range(num_ranks)) * chunks,), rows)


def _rank(rank: int, num_ranks: int, num_micro_batches: int, chunks: int) -> list[Action]:
    def turn(kind: Kind, index: int) -> Action:
        group, place = divmod(index, num_ranks * chunks)
        chunk, within = divmod(place, num_ranks)
        if kind is Kind.B:
            chunk = chunks - 1 - chunk
        return Action(kind, chunk * num_ranks + rank, group * num_ranks + within)

    total = num_micro_batches * chunks
    warm_up = min(total, 2 * (num_ranks - 1 - rank) + (chunks - 1) * num_ranks)
    row = [turn(Kind.F, index) for index in range(warm_up)]
    for index in range(total - warm_up):
        row += [turn(Kind.F, warm_up + index), turn(Kind.B, index)]
    return row + [turn(Kind.B, index) for index in range(total - warm_up, total)]
