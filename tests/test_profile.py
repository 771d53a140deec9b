"""profile=on: one file with both ranks, torch's operators and the schedule's steps on one clock."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dualpipe.schedules import make_schedule
from tests.job import Job, losses, write_text
from tests.test_config import compose
from training.profile import ProfileConfig
from training.validate import validate

STEPS = 6
LOOP = f"steps={STEPS} eval_every=100 save_every=100 sample_tokens=0 logger=none"


@pytest.mark.slow
def test_one_file_of_all_ranks_and_the_pipeline(tmp_path: Path) -> None:
    write_text(tmp_path)
    with Job(tmp_path, "plain", LOOP) as job:
        job.finish()
    with Job(tmp_path, "seen", f"{LOOP} profile=on profile.after=2 profile.steps=2") as job:
        assert f"{tmp_path}/seen/profile/trace.json.gz" in job.finish()
    assert losses(tmp_path / "seen") == losses(tmp_path / "plain"), "looking changes nothing"
    assert [p.name for p in (tmp_path / "seen" / "profile").iterdir()] == ["trace.json.gz"]
    events = read(tmp_path / "seen" / "profile" / "trace.json.gz")
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    schedule = make_schedule("dualpipe", 2, 4)
    for rank in range(2):
        assert f"rank {rank}: pipeline" in names.values()
        (timeline,) = (n for n, name in names.items() if name == f"rank {rank}: pipeline")
        (python,) = {
            e["pid"] for e in events if e["name"] == "pipeline" and names[e["pid"]].startswith(f"rank {rank}: ")
        }
        ranges = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["pid"] == python and e["name"] == "pipeline")
        assert len(ranges) == 2
        steps = sorted((e for e in events if e["pid"] == timeline and e.get("cat") == "compute"), key=lambda e: e["ts"])
        row = sorted(str(step) for step in schedule.steps[rank])
        for begin, end in ranges:
            inside = [e for e in steps if begin - 1 <= e["ts"] and e["ts"] + e["dur"] <= end + 1]
            assert sorted(e["name"] for e in inside) == row
        work = [e for e in events if e["pid"] == python and e["name"] == "mkldnn::_linear_pointwise"]
        covered = [e for e in work if any(s["ts"] <= e["ts"] <= s["ts"] + s["dur"] for s in steps)]
        # Not all: where a pair waits in its middle, its span is drawn as if it had waited at its beginning.
        assert len(covered) > 0.5 * len(work) > 0, "the clocks agree: most products are inside steps of the schedule"


@pytest.mark.slow
def test_a_chosen_rank_and_a_run_that_ends_inside_the_window(tmp_path: Path) -> None:
    write_text(tmp_path)
    with Job(tmp_path, "one", f"{LOOP} profile=on profile.ranks=[1] profile.after=4 profile.steps=50") as job:
        job.finish()
    events = read(tmp_path / "one" / "profile" / "trace.json.gz")
    assert {e["args"]["name"][:6] for e in events if e["name"] == "process_name"} == {"rank 1"}
    assert sum(e["name"] == "pipeline" for e in events) == 2


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return list(json.load(file)["traceEvents"])


@pytest.mark.parametrize("wrong", ["profile.ranks=[2]", "profile.ranks=[0,0]", "profile.steps=0", "profile.after=-1"])
def test_a_window_that_cannot_be(wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong.partition("=")[0].replace(".", r"\.")):
        validate(compose(f"profile=on {wrong}"), 2)


def test_off_unless_asked() -> None:
    assert compose("").profile == ProfileConfig()
    assert compose("profile=on").profile.enabled
