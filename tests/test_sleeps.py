"""What sleeps cost an emulated device (benchmarks/sleeps.py): its accounts of it agree where nothing scatters."""

from __future__ import annotations

import random

import pytest

from benchmarks.sleeps import Sleeping
from dualpipe.costs import Costs
from dualpipe.schedules import make_schedule
from dualpipe.simulator import simulate

SCHEDULES = ("dualpipe", "dualpipev", "one_f_one_b", "zbv")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("early", (False, True))
def test_without_scatter_all_accounts_are_the_simulated_makespan(name: str, early: bool) -> None:
    schedule = make_schedule(name, 4, 8)
    found = Sleeping(2.0, 2.0, [(2.0, 2.0, 2.0)] * 5).makespans(schedule, 0.5, early)
    lengths = (2.0,) * schedule.num_stages
    expected = simulate(schedule, Costs(lengths, lengths, lengths, latency=0.5), early=early).makespan
    assert found == pytest.approx(dict.fromkeys(found, expected))


def test_a_sleep_costs_what_its_action_takes_longer_with_it_than_without() -> None:
    sleeping = Sleeping.of([1.0, 9.0, 2.0], 66.0, 6.0, [(11.0, 12.0, 10.0)], count=6)
    assert sleeping == Sleeping(2.0, 10.0, [(10.0, 11.0, 9.0)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_scatter_of_the_same_mean_makes_ranks_wait_for_each_other(name: str) -> None:
    chance = random.Random(1)
    trios = [tuple(1 + chance.choice((-0.2, 0.2)) for _ in range(3)) for _ in range(500)]
    mean = sum(map(sum, trios)) / 1500
    schedule = make_schedule(name, 8, 20)
    found = Sleeping(mean, mean, trios).makespans(schedule, 0.0, early=False)  # type: ignore[arg-type]
    more = found["as they cost one by one"] / found["what sleeps cost"]
    assert 1.01 < more < 1.2


def test_a_single_rank_waits_for_nobody() -> None:
    """So drawing every action's cost makes its makespan their sum, whose mean is that of the costs."""
    trios = [(0.5, 1.0, 1.5), (1.5, 2.0, 0.5)]
    found = Sleeping(1.0, 7 / 6, trios).makespans(make_schedule("one_f_one_b", 1, 200), 0.0, early=False)
    assert found["as they cost one by one"] == pytest.approx(found["what sleeps cost"], rel=0.05)
    assert found["as long as sleeps last"] == pytest.approx(600)
