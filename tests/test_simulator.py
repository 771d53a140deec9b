"""The simulator against figures worked out by hand, and properties that every simulation has."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.compare import Refusal, Row, compare, formula_bubble
from dualpipe.costs import Costs, uniform
from dualpipe.csvio import read_csv
from dualpipe.schedule import parts
from dualpipe.schedules import SCHEDULES, make_schedule
from dualpipe.simulator import simulate
from dualpipe.timeline import COMPUTE, MESSAGES, Span, Timeline
from dualpipe.validate import InvalidScheduleError, dependencies

times = st.floats(0.1, 10)


@st.composite
def costs_for(draw: st.DrawFn, num_stages: int) -> Costs:
    forward, inputs, weights = (draw(st.tuples(*[times] * num_stages)) for _ in range(3))
    overlap = draw(st.floats(0.5, 1))
    return Costs(forward, inputs, weights, overlap=overlap, latency=draw(times), size=draw(times), bandwidth=2.0)


def spans(timeline: Timeline, lane: str = COMPUTE) -> dict[str, tuple[float, float]]:
    return {s.label: (s.start, s.end) for s in timeline.spans if s.lane == lane}


def test_one_micro_batch_through_two_uneven_stages() -> None:
    schedule = read_csv("0F0,0I0,0W0\n1F0,1B0\n")
    costs = Costs((1.0, 2.0), (3.0, 4.0), (5.0, 6.0), latency=0.5, size=1.0, bandwidth=4.0)
    timeline = simulate(schedule, costs)
    assert spans(timeline) == {
        "0F0": (0.0, 1.0),
        "1F0": (1.75, 3.75),  # after size / bandwidth = 0.25 and latency 0.5
        "1B0": (3.75, 13.75),  # B is I + W
        "0I0": (14.5, 17.5),
        "0W0": (17.5, 22.5),
    }
    assert spans(timeline, MESSAGES) == {"0F0 to 1": (1.0, 1.75), "1B0 to 0": (13.75, 14.5)}
    assert timeline.makespan == 22.5
    assert timeline.busy == (9.0, 12.0)
    assert timeline.idle == (13.5, 10.5)
    assert timeline.bubble == 24.0 / 45.0
    assert timeline.peak_activations == (1, 1)
    assert timeline.peak_deferred == (1, 0)


def test_messages_queue_for_their_link_but_latencies_overlap() -> None:
    schedule = read_csv("0F0,0F1,0F2\n1F0,1F1,1F2\n")
    costs = Costs((1.0, 0.1), (1.0, 1.0), (1.0, 1.0), latency=10.0, size=2.0, bandwidth=1.0)
    sent = spans(simulate(schedule, costs), MESSAGES)
    assert sent == {"0F0 to 1": (1.0, 13.0), "0F1 to 1": (3.0, 15.0), "0F2 to 1": (5.0, 17.0)}


def test_a_pair_takes_overlap_times_its_parts_and_sends_at_its_end() -> None:
    schedule = read_csv("0F0,0F1,0B0,0B1\n1F0,(1F1;1B0)OVERLAP_F_B,1B1\n")
    timeline = simulate(schedule, dataclasses.replace(uniform(2), overlap=0.5))
    assert spans(timeline)["(1F1;1B0)OVERLAP_F_B"] == (2.0, 3.5)
    assert spans(timeline)["0B0"][0] == 3.5


def test_early_results_leave_when_they_are_there() -> None:
    schedule = read_csv("0F0,0F1,0B0,0B1\n1F0,(1F1;1B0)OVERLAP_F_B,1B1\n")
    costs = Costs((1.0, 1.0), (1.0, 2.0), (1.0, 4.0), latency=0.5)
    late, early = spans(simulate(schedule, costs)), spans(simulate(schedule, costs, early=True))
    assert late["(1F1;1B0)OVERLAP_F_B"] == early["(1F1;1B0)OVERLAP_F_B"] == (2.5, 9.5)
    assert (late["0B0"], late["1B1"], late["0B1"]) == ((10.0, 12.0), (9.5, 15.5), (16.0, 18.0))
    assert (early["0B0"], early["1B1"], early["0B1"]) == ((5.0, 7.0), (9.5, 15.5), (12.0, 14.0))
    slow = Costs((3.0, 1.0), (1.0, 2.0), (1.0, 4.0), latency=3.0)
    waits = spans(simulate(schedule, slow, early=True))
    assert waits["1F0"] == (6.0, 7.0)
    assert waits["(1F1;1B0)OVERLAP_F_B"] == (7.0, 14.0), "its F arrives at 9, under its B"
    slower = spans(simulate(schedule, dataclasses.replace(slow, forward=(9.0, 1.0)), early=True))
    assert slower["(1F1;1B0)OVERLAP_F_B"] == (15.0, 22.0), "B from 13 to 19, F from its arrival at 21 to 22"
    assert slower["0B0"][0] == 18.0, "its gradient left at 15"


def test_the_turn_of_a_v_sends_nothing() -> None:
    timeline = simulate(read_csv("0F0,1F0,1B0,0B0\n"), dataclasses.replace(uniform(2), latency=9.0))
    assert timeline.makespan == 6.0
    assert not spans(timeline, MESSAGES)


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 4), st.data())
@settings(max_examples=60, deadline=None)
def test_what_every_simulation_obeys(name: str, half: int, data: st.DataObject) -> None:
    schedule = make_schedule(name, 2 * half, 4 * half + 2)
    costs = data.draw(costs_for(schedule.num_stages))
    timeline = simulate(schedule, costs)
    end = {}
    for rank, row in enumerate(timeline.computing):
        assert [s.label for s in row] == [str(step) for step in schedule.steps[rank]]
        assert all(a.end <= b.start for a, b in itertools.pairwise(row)), "a rank does one thing at a time"
        assert timeline.busy[rank] == pytest.approx(sum(costs.of(step) for step in schedule.steps[rank]))
        for span, step in zip(row, schedule.steps[rank], strict=True):
            end.update(dict.fromkeys(parts(step), (span.end, rank)))
    delay = costs.latency + costs.transfer
    for rank, row in enumerate(timeline.computing):
        for span, step in zip(row, schedule.steps[rank], strict=True):
            for alternatives in (d for action in parts(step) for d in dependencies(schedule, action)):
                ready, where = next(end[a] for a in alternatives if a in end)
                assert span.start >= ready + (delay if where != rank else 0) - 1e-9
    assert min(timeline.idle) >= -1e-9
    assert simulate(schedule, costs, early=True).makespan <= timeline.makespan + 1e-9
    faster = simulate(schedule, dataclasses.replace(costs, latency=0.0))
    assert faster.makespan <= timeline.makespan


def test_a_deadlock_and_wrong_costs_are_refused() -> None:
    crossed = read_csv("0B0,0F0\n")
    with pytest.raises(InvalidScheduleError, match="rank 0 waits for ever at 0B0"):
        simulate(crossed, uniform(1))
    with pytest.raises(ValueError, match="has 4 stages, the costs are for 3"):
        simulate(make_schedule("gpipe", 4, 4), uniform(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Costs((1.0,), (1.0, 1.0), (1.0,)), "one F, I, W and B per stage; got 1, 2, 1 and 1"),
        (lambda: Costs((), (), ()), "got 0, 0, 0 and 0"),
        (lambda: Costs((-1.0,), (1.0,), (1.0,)), "at least 0; got -1.0"),
        (lambda: Costs((math.nan,), (1.0,), (1.0,)), "finite"),
        (lambda: Costs((1.0,), (1.0,), (1.0,), bandwidth=0.0), "above 0; got 0.0"),
        (lambda: uniform(2, weights=3.0), "W is a part of B: give weights between 0 and 2.0; got 3.0"),
    ],
)
def test_bad_costs_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()  # type: ignore[operator]
    assert message in str(caught.value)


def test_splitting_stages_keeps_the_work() -> None:
    costs = Costs((1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (7.0, 9.0), 0.9, 0.1, 2.0, 3.0)
    halves = costs.split(2)
    assert halves.forward == (0.5, 0.5, 1.0, 1.0)
    assert halves.backward == (3.5, 3.5, 4.5, 4.5)
    assert (halves.overlap, halves.latency, halves.transfer) == (0.9, 0.1, 2 / 3)


def test_a_measured_timeline_need_not_start_at_zero_and_travels_by_pickle() -> None:
    recorded = (
        Span(1, COMPUTE, "1F0", 102.0, 103.0),
        Span(0, COMPUTE, "0F0", 100.0, 101.0),
        Span(1, "experts of layer 3", "any text", 103.0, 104.0),
    )
    timeline = pickle.loads(pickle.dumps(Timeline("measured", 2, recorded)))
    assert timeline == Timeline("measured", 2, recorded)
    assert timeline.makespan == 4.0
    assert timeline.idle == (3.0, 3.0)
    assert timeline.peak_activations == (1, 1)
    assert Timeline("nothing", 2, ()).bubble == 0.0


# -- compare -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal", ["stages", "devices"])
def test_formula_and_simulation_agree_at_the_published_costs(equal: str) -> None:
    for row in compare(uniform(8), 32, equal):
        assert isinstance(row, Row)
        assert row.formula is None or row.idle == pytest.approx((row.formula,) * row.ranks), row.name


def test_other_costs_only_approximate_the_formula() -> None:
    costs = uniform(8, backward=2.5, weights=1.2, pair=3.2)
    idle = simulate(make_schedule("dualpipe", 8, 20), costs).idle
    assert (min(idle), max(idle)) == pytest.approx((4.8, 5.4))  # FACTS.md
    assert formula_bubble("dualpipe", 8, costs) == pytest.approx(6.3)


def test_equal_devices_hold_the_same_model() -> None:
    rows = {row.name: row for row in compare(uniform(4), 16, "devices") if isinstance(row, Row)}
    assert {row.ranks for row in rows.values()} == {4}
    busy = {round(row.makespan - row.idle[0], 9) for row in rows.values()}
    assert busy == {48.0}
    assert (rows["dualpipe"].parameters, rows["dualpipev"].parameters) == (2, 1)
    assert (rows["dualpipe"].activations, rows["dualpipev"].activations) == (5, 4.5)


def test_a_schedule_that_does_not_fit_says_why() -> None:
    rows = {row.name: row for row in compare(uniform(5), 6, "stages")}
    assert isinstance(rows["dualpipe"], Refusal)
    assert "even number of ranks" in rows["dualpipe"].reason
    assert isinstance(rows["zbv"], Refusal)
    assert "2 stages per rank" in rows["zbv"].reason
    assert isinstance(rows["gpipe"], Row)
    with pytest.raises(ValueError, match="got 'ranks'"):
        compare(uniform(5), 6, "ranks")
