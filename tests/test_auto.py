"""The searched schedule: valid, within memory, never slower than a known one, a function of its arguments."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.__main__ import main
from dualpipe.auto import both_cuts, judge, known_schedules, search
from dualpipe.costs import Costs, uniform
from dualpipe.csvio import read_csv
from dualpipe.greedy import Problem, run_policy
from dualpipe.policies import first_policy
from dualpipe.refine import Refiner
from dualpipe.schedule import Schedule
from dualpipe.schedules import make_schedule
from dualpipe.schedules.dualpipev import v_placement
from dualpipe.simulator import simulate
from dualpipe.validate import validate

QUICK = 30_000
UNEVEN = Costs((1.05, 1, 1, 1.7), (1, 1, 1, 1.7), (1.1, 1, 1, 1.7), overlap=0.8)  # embedding; head and MTP

times = st.floats(0.1, 3)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, Costs, float]:
    ranks = draw(st.integers(1, 5))
    stages = ranks * draw(st.integers(1, 2))
    forward, inputs, weights = (draw(st.tuples(*[times] * stages)) for _ in range(3))
    overlap = draw(st.one_of(st.just(1.0), st.floats(0.6, 0.95), st.tuples(*[st.floats(0.6, 1)] * stages)))
    latency, size = draw(st.sampled_from((0.0, 0.2))), draw(st.sampled_from((0.0, 0.1)))
    costs = Costs(forward, inputs, weights, overlap=overlap, latency=latency, size=size, bandwidth=1.0)
    return ranks, draw(st.integers(1, 14)), costs, draw(st.floats(2, 2 * ranks + 2))


@given(cases())
@settings(max_examples=40, deadline=None)
def test_what_is_found_is_valid_fits_and_is_never_slower_than_a_known_schedule(
    case: tuple[int, int, Costs, float],
) -> None:
    ranks, num, costs, cap = case
    found = search(ranks, num, costs, cap, effort=3_000)
    validate(found.schedule)
    timeline = simulate(found.schedule, found.costs)
    assert found.makespan == timeline.makespan
    assert max(timeline.peak_activations) * ranks / found.schedule.num_stages <= cap
    for cut in both_cuts(costs, ranks):
        for known in known_schedules(ranks, num, cut):
            assert known.activations > cap or found.makespan <= known.makespan + 1e-9, known.schedule.name


def test_it_beats_dualpipe_where_stages_are_uneven_and_where_memory_is_looser() -> None:
    ends = Costs((1.05, *[1] * 6, 1.7), (*[1] * 7, 1.7), (1.1, *[1] * 6, 1.7), overlap=0.8)
    known = judge(make_schedule("dualpipe", 8, 20), ends)
    for cap in (9, 13):
        assert search(8, 20, ends, cap, effort=300_000).makespan < 0.99 * known.makespan


def test_it_fits_where_dualpipe_does_not() -> None:
    found = search(4, 12, UNEVEN, 3, effort=QUICK)
    assert found.activations <= 3
    assert judge(make_schedule("dualpipe", 4, 12), UNEVEN).activations == 5


def test_at_the_published_costs_the_bubble_is_smaller_than_dualpipes() -> None:
    assert search(8, 20, uniform(8), effort=300_000).makespan < 66


def test_the_same_arguments_give_the_same_schedule_and_one_copy_means_one_direction() -> None:
    one, other = (search(4, 12, UNEVEN, effort=QUICK) for _ in range(2))
    assert one == other
    assert one.schedule.name == "auto"
    assert search(4, 12, UNEVEN, bidirectional=False, effort=QUICK).schedule.num_directions == 1


def test_the_clock_of_greedy_and_refinement_is_the_simulators() -> None:
    costs = Costs(UNEVEN.forward, UNEVEN.inputs, UNEVEN.weights, overlap=0.8, latency=0.3, size=0.2, bandwidth=1.0)
    for cut, placement in ((costs, ((0, 1, 2, 3), (3, 2, 1, 0))), (costs.split(2), (v_placement(4),))):
        problem = Problem(placement, 4, 10, cut, 12)
        written = run_policy(problem, first_policy(problem))
        assert written is not None
        rows, makespan = written
        schedule = Schedule("greedy", 10, placement, rows)
        validate(schedule)
        assert simulate(schedule, cut).makespan == pytest.approx(makespan)
        refiner = Refiner(schedule, cut, 12, random.Random(0))
        refiner.run(2000)
        validate(refiner.best_schedule)
        better = simulate(refiner.best_schedule, cut)
        assert better.makespan <= makespan
        assert max(better.peak_activations) <= 12
        ends = [row[-1].end for row in better.computing]
        assert refiner.best == pytest.approx(max(ends) + 0.01 * sum(ends) / 4)


def test_cutting_and_merging_are_inverse() -> None:
    costs = Costs((1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (7.0, 9.0), (0.5, 0.75), 0.1, 2.0, 3.0)
    assert costs.split(4).merged(4) == costs
    mixed = Costs((1.0, 1.0), (1.0, 1.0), (1.0, 0.0), overlap=(0.5, 1.0)).merged(2)
    assert mixed.overlaps == (pytest.approx((0.5 * 3 + 2) / 5),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forward", "1,1,1"], "--forward lists 3 stages, but there are 4"),
        (["--max-activations", "0.4"], "max_activations=0.4 leaves no room"),
        (["--micro-batches", "0"], "at least 1 rank and 1 micro-batch; got 4 and 0"),
        (["--effort", "0"], "--effort 0 must be at least 1"),
        (["--overlap", "0.8,0.9"], "--overlap lists 2 stages, but there are 4"),
        (["--out", "/nowhere/found.csv", "--effort", "1"], "cannot write /nowhere/found.csv: No such file"),
    ],
)
def test_bad_input_gives_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--ranks", "4", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_command_prints_a_table_and_writes_a_schedule_that_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.csv"
    lists = ["--forward", "1,1,1,1,1,1,1,1.7", "--backward", "2", "--weights", "1"]  # 2R stages
    size = ["--ranks", "4", "--micro-batches", "8"]
    assert main(["search", *size, *lists, "--overlap", "0.8", "--effort", str(QUICK), "--out", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("auto ")
    assert {"dualpipe", "dualpipev", "zbv", "one_f_one_b"} <= {line.split()[0] for line in lines if line}
    schedule = read_csv(file.read_text())
    validate(schedule)
    assert schedule.num_ranks == 4
