"""DualPipeV: DualPipe cut in half. Each rank holds two stages, in a V, and nothing is held twice.

On R ranks there are 2·R stages; rank r holds stage r on the way down and stage 2R−1−r on the way up. In DualPipe on
2·R ranks the upper half mirrors the lower one: what rank 2R−1−r does for direction 1, rank r does at the same time
for direction 0. So the lower half alone is a complete schedule, once a micro-batch of direction 1 is taken to be the
continuation of its mirror in direction 0. With PP = 2·R stages the bubble and the PP + 1 live activations stay those
of DualPipe, on half the ranks.
"""

from __future__ import annotations

from dualpipe.schedule import Action, Pair, Schedule, Step
from dualpipe.schedules.dualpipe import dualpipe


def dualpipev(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Generate DualPipeV. Raises ValueError if M < 2·ranks."""
    if num_ranks < 1 or num_micro_batches < 2 * num_ranks:
        raise ValueError(
            f"DualPipeV on {num_ranks} ranks needs at least {2 * max(num_ranks, 1)} micro-batches; "
            f"got {num_micro_batches}"
        )
    whole = dualpipe(2 * num_ranks, 2 * num_micro_batches)
    rows = tuple(tuple(_fold(step, num_micro_batches) for step in row) for row in whole.steps[:num_ranks])
    return Schedule("dualpipev", num_micro_batches, (v_placement(num_ranks),), rows)


def v_placement(num_ranks: int) -> tuple[int, ...]:
    """Rank of each of 2·ranks stages: down 0, 1, ..., R−1 and up again."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def _fold(step: Step, share: int) -> Step:
    if isinstance(step, Pair):
        return Pair(_fold_action(step.forward, share), _fold_action(step.backward, share))
    return _fold_action(step, share)


def _fold_action(action: Action, share: int) -> Action:
    return Action(action.kind, action.stage, action.micro_batch % share)
