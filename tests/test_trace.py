"""What `trace=true` records: costs read off a timeline, and a real run's metrics and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dualpipe.costs import Costs
from dualpipe.measured import costs_of
from dualpipe.schedules import SCHEDULES, make_schedule
from dualpipe.simulator import simulate
from dualpipe.timeline import COMPUTE, Span, Timeline
from tests.job import Job, write_text
from tests.test_config import check
from training.trace import timelines


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_costs_read_off_a_simulated_timeline_predict_it_again(name: str) -> None:
    schedule = make_schedule(name, 4, 12)
    times = tuple(1.0 + s / 10 for s in range(schedule.num_stages))
    costs = Costs(times, tuple(1.1 * t for t in times), tuple(0.9 * t for t in times), overlap=0.8)
    timeline = simulate(schedule, costs)
    found = costs_of(timeline, schedule.num_stages)
    assert found.forward == pytest.approx(costs.forward)
    assert found.backward == pytest.approx(costs.backward)
    measured, predicted = timelines(list(timeline.spans), schedule, "again")
    assert predicted.makespan == pytest.approx(measured.makespan)
    assert predicted.bubble == pytest.approx(measured.bubble)


def test_waiting_for_messages_shows_as_measured_bubble_above_the_predicted_one() -> None:
    schedule = make_schedule("one_f_one_b", 2, 4)
    late = simulate(schedule, Costs((1.0, 1.0), (1.0, 1.0), (1.0, 1.0), latency=0.5))
    measured, predicted = timelines(list(late.spans), schedule, "late")
    assert predicted.bubble == pytest.approx(3 / 15)
    assert measured.bubble > predicted.bubble + 0.03


def test_a_stage_that_never_ran_is_named() -> None:
    with pytest.raises(ValueError, match="1F was not measured"):
        costs_of(Timeline("short", 1, (Span(0, COMPUTE, "0F0", 0.0, 1.0), Span(0, COMPUTE, "0B0", 1.0, 2.0))), 2)
    with pytest.raises(ValueError, match="0B was not measured"):
        costs_of(Timeline("short", 1, (Span(0, COMPUTE, "0F0", 0.0, 1.0),)), 1)


def test_a_bad_window_is_refused() -> None:
    with pytest.raises(ValueError, match="trace_every=0 must be at least 1"):
        check("trace=true trace_every=0", 2)


@pytest.mark.slow
def test_a_run_records_its_timeline_as_metrics_picture_and_trace(tmp_path: Path) -> None:
    write_text(tmp_path)
    overrides = "schedule=auto schedule.effort=2000 trace=true trace_every=2 steps=4 logger=wandb sample_tokens=0"
    with Job(tmp_path, "traced", overrides) as job:
        job.finish()
    rows = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    traced = {row["step"]: row for row in rows if "trace/bubble" in row}
    assert set(traced) == {2, 4}
    for row in traced.values():
        assert 0 <= row["trace/bubble"] < 1
        assert 0 <= row["trace/bubble_predicted"] < 1
        assert 0 < row["trace/seconds"] <= row["seconds/pipeline"] * 1.5
    folder = job.run_dir / "trace"
    assert sorted(p.name for p in folder.iterdir()) == [
        f"step_0000000{n}.{kind}" for n in (2, 4) for kind in ("json", "png")
    ]
    events = json.loads((folder / "step_00000004.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert {"auto, step 4, measured rank 0", "auto, step 4, predicted rank 1"} <= names
    steps = [e for e in events if e.get("cat") == COMPUTE]
    assert len(steps) % 2 == 0 and len({e["name"] for e in steps}) == len(steps) // 2, "the same steps, twice"
    assert any(row.get("trace") == str(folder / "step_00000002.png") for row in rows)
    assert list((job.run_dir / "wandb").glob("offline-run-*/files/media/images/trace*.png"))
