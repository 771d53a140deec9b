"""`python -m training.measure` as a user starts it: alone and under torchrun, and what it says to wrong arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.job import MODEL, ROOT, write_text

ALONE = [sys.executable, "-m", "training.measure"]
PARTS = {"forward", "inputs", "weights", "overlap"}


def start(folder: Path, command: list[str], overrides: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    places = f"data.path={folder / 'text'} data.cache_dir={folder / 'cache'} runs_dir={folder / 'runs'}"
    return subprocess.run(
        [*command, *f"{MODEL} data.seq_len=32 {places} launch.timeout_seconds=60 {overrides}".split()],
        cwd=ROOT, env={**inherited, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=150,
    )  # fmt: skip


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "-m", "training.measure"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_costs_of_every_kind_of_layer_are_written_and_read_back(processes: int, tmp_path: Path) -> None:
    write_text(tmp_path)
    trained = tmp_path / "runs" / "default" / "checkpoints" / "step_00000001"  # of no concern to a measurement
    trained.mkdir(parents=True)
    out = tmp_path / "costs.json"
    command = ALONE if processes == 1 else torchrun(processes)
    done = start(tmp_path, command, f"out={out} model.mtp_depth=1 model.num_dense_layers=1 parallel.ep={processes}")
    assert done.returncode == 0, done.stdout + done.stderr
    costs = json.loads(out.read_text())
    assert json.loads(done.stdout) == costs, "printed once, by rank 0"
    assert set(costs) == {"embedding", "dense", "moe", "mtp", "head", "latency", "transfer"}
    for kind in ("dense", "moe", "mtp", "head"):
        assert set(costs[kind]) == PARTS
        assert all(costs[kind][part] > 0 for part in PARTS)
        assert 0.5 <= costs[kind]["overlap"] <= 1
    if processes > 1:
        assert costs["moe"]["overlap"] < 1, "some of it is the all-to-all"
    if processes != 4:
        return
    size = "model.num_layers=4 parallel.pp=2 schedule=auto schedule.effort=2000 dry_run=true launch.processes=2"
    used = start(tmp_path, [sys.executable, "train.py"], f"{size} schedule.costs={out}")
    assert used.returncode == 0, used.stdout + used.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("", "error: say where to write the costs: out=costs.json\n"),
        ("out=/nowhere/costs.json", "error: out=/nowhere/costs.json: there is no such folder\n"),
        ("out=/tmp", "error: out=/tmp is a folder; name a file\n"),
        (
            "out=/tmp/costs.json parallel.ep=2",
            "error: parallel.ep=2 is measured by 2 processes, but there is 1: start it under torchrun "
            "--nproc-per-node=2, or set parallel.ep=1\n",
        ),
        ("out=/tmp/costs.json parallel.ep=none", "error: Error merging override parallel.ep=none: Value 'none' of"),
    ],
)
def test_a_wrong_argument_gives_one_line(overrides: str, message: str, tmp_path: Path) -> None:
    write_text(tmp_path)
    done = start(tmp_path, ALONE, overrides)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_too_many_processes_say_so_once(tmp_path: Path) -> None:
    write_text(tmp_path)
    done = start(tmp_path, torchrun(3), "out=/tmp/costs.json parallel.ep=1")
    assert done.returncode != 0
    wanted = "error: parallel.ep=1 is measured by 1 process, but there are 3: start it without torchrun"
    assert done.stderr.count(wanted) == 1
