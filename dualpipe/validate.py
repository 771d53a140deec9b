"""Is a schedule a correct plan? Checked by running it symbolically, all ranks at once.

Three things can be wrong, and each has its own message:
1. an action stands on a rank that does not hold its stage, or names a stage or micro-batch that does not exist;
2. some F, B, I or W is missing or doubled: every micro-batch passes every stage once forward, and once backward,
   either as B or as I and a W;
3. the order cannot be executed: ranks wait for each other for ever, or for something that comes later on the same
   rank. Messages are buffered, so this is exactly a cycle in the dependency graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from dualpipe.schedule import Action, Kind, Pair, Schedule, Step, parts


class InvalidScheduleError(ValueError):
    """The schedule is not executable; the message names the first actions at fault."""


def dependencies(schedule: Schedule, action: Action) -> Iterator[tuple[Action, ...]]:
    """What must be done before `action`: each item is a tuple of alternatives (B or I serve equally)."""
    kind, stage, mb = action.kind, action.stage, action.micro_batch
    if kind is Kind.F:
        if stage > 0:
            yield (Action(Kind.F, stage - 1, mb),)
    elif kind is Kind.W:
        yield (Action(Kind.I, stage, mb),)
    else:
        yield (Action(Kind.F, stage, mb),)
        if stage < schedule.num_stages - 1:
            yield (Action(Kind.B, stage + 1, mb), Action(Kind.I, stage + 1, mb))


def validate(schedule: Schedule, forward_only: bool = False) -> None:
    """Raise InvalidScheduleError unless the schedule is complete, well placed and free of deadlock."""
    _check_shape(schedule)
    _check_placement(schedule)
    _check_complete(schedule, forward_only)
    _check_executable(schedule)


def _check_shape(schedule: Schedule) -> None:
    if not schedule.placement or not schedule.placement[0] or not schedule.steps:
        raise InvalidScheduleError(f"{schedule.name}: no ranks or no stages")
    if schedule.num_micro_batches < 1:
        raise InvalidScheduleError(f"{schedule.name}: {schedule.num_micro_batches} micro-batches; need at least 1")
    for row in schedule.placement:
        bad = [r for r in row if not 0 <= r < schedule.num_ranks]
        if bad or len(row) != schedule.num_stages:
            raise InvalidScheduleError(f"{schedule.name}: placement {row} does not fit {schedule.num_ranks} ranks")
    if schedule.num_micro_batches % schedule.num_directions:
        raise InvalidScheduleError(
            f"{schedule.name}: {schedule.num_micro_batches} micro-batches cannot be shared equally "
            f"by {schedule.num_directions} directions"
        )


def _check_placement(schedule: Schedule) -> None:
    for rank in range(schedule.num_ranks):
        for step in schedule.steps[rank]:
            for action in parts(step):
                if not (0 <= action.stage < schedule.num_stages):
                    raise InvalidScheduleError(
                        f"rank {rank}: {action} names a stage outside 0..{schedule.num_stages - 1}"
                    )
                if not (0 <= action.micro_batch < schedule.num_micro_batches):
                    raise InvalidScheduleError(
                        f"rank {rank}: {action} names a micro-batch outside 0..{schedule.num_micro_batches - 1}"
                    )
                owner = schedule.rank_of(action.stage, action.micro_batch)
                if owner != rank:
                    raise InvalidScheduleError(f"rank {rank}: {action} belongs on rank {owner}")
            if isinstance(step, Pair) and (step.forward.kind, step.backward.kind) != (Kind.F, Kind.B):
                raise InvalidScheduleError(f"rank {rank}: {step} must pair one F with one B")


def _check_complete(schedule: Schedule, forward_only: bool) -> None:
    count = Counter(a for r in range(schedule.num_ranks) for a in schedule.actions(r))
    for action, times in count.items():
        if times > 1:
            raise InvalidScheduleError(f"{action} stands {times} times")
        if forward_only and action.kind is not Kind.F:
            raise InvalidScheduleError(f"{action} in a forward-only schedule")
    for stage in range(schedule.num_stages):
        for mb in range(schedule.num_micro_batches):
            f, b, i, w = (count[Action(k, stage, mb)] for k in (Kind.F, Kind.B, Kind.I, Kind.W))
            if not f:
                raise InvalidScheduleError(f"{Action(Kind.F, stage, mb)} is missing")
            if not forward_only and (b, i, w) not in ((1, 0, 0), (0, 1, 1)):
                found = ", ".join(f"{n} {k}" for n, k in ((b, "B"), (i, "I"), (w, "W")) if n) or "none"
                raise InvalidScheduleError(
                    f"stage {stage}, micro-batch {mb}: backward must be one B, or one I and one W; found {found}"
                )


def _check_executable(schedule: Schedule) -> None:
    """Let every rank advance as far as it can, until all are through or all wait."""
    done: set[Action] = set()
    position = [0] * schedule.num_ranks
    progress = True
    while progress:
        progress = False
        for rank, row in enumerate(schedule.steps):
            while position[rank] < len(row) and not missing(schedule, row[position[rank]], done):
                done.update(parts(row[position[rank]]))
                position[rank] += 1
                progress = True
    stuck = [
        f"rank {r} waits at {row[position[r]]} for {missing(schedule, row[position[r]], done)[0]}"
        for r, row in enumerate(schedule.steps)
        if position[r] < len(row)
    ]
    if stuck:
        raise InvalidScheduleError("deadlock: " + "; ".join(stuck))


def missing(schedule: Schedule, step: Step, done: set[Action]) -> list[Action]:
    """The dependencies of a step that are not in `done` (of alternatives, the first is named)."""
    return [
        alternatives[0]
        for action in parts(step)
        for alternatives in dependencies(schedule, action)
        if not any(a in done for a in alternatives)
    ]
