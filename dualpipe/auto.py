"""`auto`: a schedule that is searched for, not written by hand.

Given what each stage costs and how many activations a rank may keep, the search returns the fastest schedule that it
finds in a few seconds, in three passes:

1. the schedules known by name that fit the memory: so the result is never slower than the best of them;
2. schedules written by a greedy rule, whose numbers are varied by hill climbing (`policies.py`, `greedy.py`);
3. the most promising of these, changed step by step where it matters (`refine.py`).

Placements. Straight (a rank holds one stage), bidirectional (a rank holds stage s and its mirror, parameters are there
twice) and V (the model cut twice as fine, two stages per rank) are all open to it. They are compared on equal devices:
memory counts in R-ths of the model, so an activation of a V's thin stage counts half.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dualpipe.costs import Costs
from dualpipe.greedy import Problem, run_policy
from dualpipe.policies import Climber, held_stages
from dualpipe.refine import Refiner
from dualpipe.schedule import Pair, Placement, Schedule
from dualpipe.schedules import LARGEST, SCHEDULES, make_schedule, options_of
from dualpipe.schedules.dualpipev import v_placement
from dualpipe.simulator import simulate
from dualpipe.validate import validate

EFFORT = 1_000_000
_OVERHEAD = 200  # of one try, in steps


@dataclass(frozen=True)
class Found:
    """A schedule with the costs of its stages, and what it is judged by.

    activations   peak of the fullest rank, in R-ths of the model
    """

    schedule: Schedule
    costs: Costs
    makespan: float
    activations: float

    @property
    def order(self) -> tuple[float, float]:
        """What is better is smaller: the makespan, and between equals the memory."""
        return round(self.makespan, 9), self.activations


def search(
    num_ranks: int,
    num_micro_batches: int,
    costs: Costs | Sequence[Costs],
    max_activations: float | None = None,
    *,
    bidirectional: bool = True,
    placement: Placement | None = None,
    effort: int = EFFORT,
    seed: int = 0,
) -> Found:
    """The valid schedule of least makespan that is found. A function of its arguments: every process finds the same.

    costs             of the model in R or 2·R stages: the other cut is made of it. Or both, R first.
    max_activations   per rank, in R-ths of the model × micro-batches, each kept until its weight gradient is done; by
                      default R + 1, as DualPipe needs.
    bidirectional     may parameters be held twice?
    placement         the only one to look at; None: all
    effort            how many steps may be clocked; a million takes about four seconds.

    Raises ValueError if the stages do not fit the ranks, or no schedule fits the memory.
    """
    cuts = both_cuts(costs, num_ranks) if isinstance(costs, Costs) else tuple(costs)
    cap = num_ranks + 1 if max_activations is None else max_activations
    if not math.isfinite(cap):
        raise ValueError(f"max_activations={cap} is no amount of memory; leave it out for R + 1, or give a number")
    problems = [
        problem
        for problem in _problems(num_ranks, num_micro_batches, cuts, cap, bidirectional)
        if placement in (None, problem.placement)
    ]
    if not problems:
        raise ValueError(f"placement={placement} does not suit {num_ranks} ranks and {num_micro_batches} micro-batches")
    known = [
        f
        for cut in cuts
        for f in known_schedules(num_ranks, num_micro_batches, cut)
        if f.activations <= cap
        and (bidirectional or f.schedule.num_directions == 1)
        and placement in (None, f.schedule.placement)
    ]
    found = known + _climb(problems, known, effort // 2, seed)
    if not found:
        raise ValueError(f"no schedule was found that keeps at most max_activations={cap:g}; allow more")
    best = _refine(found, cap, effort // 2, seed)
    validate(best.schedule)
    return replace(best, schedule=replace(best.schedule, name="auto"))


def both_cuts(costs: Costs, num_ranks: int) -> tuple[Costs, Costs]:
    """The costs in R stages and in 2·R, from either. Raises ValueError for any other number."""
    if costs.num_stages == num_ranks:
        return costs, costs.split(2)
    if costs.num_stages == 2 * num_ranks:
        return costs.merged(2), costs
    raise ValueError(f"costs of {costs.num_stages} stages for {num_ranks} ranks: give {num_ranks} or {2 * num_ranks}")


def _problems(
    num_ranks: int, num_micro_batches: int, cuts: Sequence[Costs], cap: float, bidirectional: bool
) -> list[Problem]:
    if num_ranks < 1 or num_micro_batches < 1:
        raise ValueError(f"need at least 1 rank and 1 micro-batch; got {num_ranks} and {num_micro_batches}")
    if 2 * num_ranks * num_micro_batches > LARGEST:
        raise ValueError(
            f"schedules of {num_ranks} ranks and {num_micro_batches} micro-batches would have up to "
            f"{2 * num_ranks * num_micro_batches} forwards; at most {LARGEST} are made"
        )
    problems = []
    for costs in cuts:
        per_rank = costs.num_stages // num_ranks
        for placement in _placements(num_ranks, num_micro_batches, per_rank, bidirectional):
            problem = Problem(placement, num_ranks, num_micro_batches, costs, int(cap * per_rank + 1e-9))
            if problem.max_activations >= max(map(len, held_stages(problem))):
                problems.append(problem)
    if not problems:
        raise ValueError(f"max_activations={cap:g} leaves no room: a rank keeps at least one activation of each stage")
    return problems


def _placements(num_ranks: int, num_micro_batches: int, per_rank: int, bidirectional: bool) -> Iterator[Placement]:
    if per_rank == 2:
        yield (v_placement(num_ranks),)
        return
    down = tuple(range(num_ranks))
    yield (down,)
    if bidirectional and num_micro_batches % 2 == 0:
        yield (down, down[::-1])


def known_schedules(num_ranks: int, num_micro_batches: int, costs: Costs) -> Iterator[Found]:
    """The schedules by name that this size admits, at these costs."""
    for name in SCHEDULES:
        options = {"chunks": costs.num_stages // num_ranks} if "chunks" in options_of(name) else {}
        try:
            schedule = make_schedule(name, num_ranks, num_micro_batches, **options)
        except ValueError:
            continue  # not at this size
        if schedule.num_stages == costs.num_stages:
            yield judge(schedule, costs)


def judge(schedule: Schedule, costs: Costs) -> Found:
    timeline = simulate(schedule, costs)
    activations = max(timeline.peak_activations) * schedule.num_ranks / schedule.num_stages
    return Found(schedule, costs, timeline.makespan, activations)


def _climb(problems: Sequence[Problem], known: Sequence[Found], effort: int, seed: int) -> list[Found]:
    """The best that a greedy rule writes, for each placement; those that promise more get more turns."""
    climbers = []
    for number, problem in enumerate(problems):
        short = replace(problem, num_micro_batches=_short(problem))
        models = [f.schedule for f in known if f.schedule.placement == problem.placement and _has_pairs(f.schedule)]
        climbers.append(Climber(short, models, random.Random(f"{seed} {number}")))
    turn = 0
    while effort > 0:
        climber = climbers[turn % len(climbers)]
        if turn >= 20 * len(climbers) and turn % 2:  # every other turn goes to the leader
            climber = min(climbers, key=lambda c: c.best[1] if c.best is not None else float("inf"))
        climber.climb()
        effort -= _size(climber.problem)
        turn += 1
    found = []
    for climber, problem in zip(climbers, problems, strict=True):
        written = run_policy(problem, climber.best_policy) if climber.best is not None else None
        if written is not None:
            rows, _ = written
            found.append(judge(Schedule("auto", problem.num_micro_batches, problem.placement, rows), problem.costs))
    return found


def _short(problem: Problem) -> int:
    """A rule does not know M, so it is tuned on as many micro-batches as show a steady state."""
    return min(problem.num_micro_batches, 4 * problem.num_ranks)


def _has_pairs(schedule: Schedule) -> bool:
    return any(isinstance(step, Pair) for row in schedule.steps for step in row)


def _size(problem: Problem) -> int:
    return _OVERHEAD + 3 * problem.costs.num_stages * problem.num_micro_batches


def _refine(found: Sequence[Found], cap: float, effort: int, seed: int) -> Found:
    """Improve the three best for a while, and then the best of them."""
    leaders = sorted(found, key=lambda f: f.order)[:3]
    refiners = []
    for number, leader in enumerate(leaders):
        per_rank = leader.schedule.num_stages / leader.schedule.num_ranks
        room = int(cap * per_rank + 1e-9)
        refiners.append(Refiner(leader.schedule, leader.costs, room, random.Random(f"{seed} {number}")))
    # A try is cheap: most are given up before they are clocked.
    tries = 8 * effort // (_OVERHEAD + sum(map(len, leaders[0].schedule.steps)))
    for refiner in refiners:
        refiner.run(tries // (2 * len(refiners)))
    best = min(range(len(refiners)), key=lambda n: refiners[n].best)
    refiners[best].run(tries // 2)
    improved = [judge(r.best_schedule, f.costs) for r, f in zip(refiners, leaders, strict=True)]
    return min([*leaders, *improved], key=lambda f: f.order)
