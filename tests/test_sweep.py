"""Many runs from one command: Hydra's multirun, and the command that W&B's agent makes of our sweep file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.job import MODEL, ROOT, SIZE, losses, write_text
from training.config import Config
from training.sweep import JobFailed, job_command, run_job


def test_a_job_gets_its_own_name_and_enough_processes() -> None:
    config = Config(run="lr")
    config.parallel.pp, config.parallel.ep = 4, 2
    command = job_command("train.py", config, ["run=lr", "optim.lr=1", "parallel.pp=4"], 3)
    assert "--nproc-per-node=8" in command
    assert command[-4:] == ["train.py", "run=lr.3", "optim.lr=1", "parallel.pp=4"]
    config.launch.processes = 16
    assert "--nproc-per-node=16" in job_command("train.py", config, [], 0)


@pytest.mark.parametrize(
    ("values", "result"), [([3.0, 2.5], 2.5), ([2.5, "nan"], math.nan), ([], "ended early, before its first")]
)
def test_the_result_of_a_job_is_its_last_validation(
    values: list[float | str], result: float | str, tmp_path: Path
) -> None:
    """A job that writes these; one that ended in disorder must not look like the best one."""
    rows = [{"step": 1, "train/loss": 1.0}, *({"step": step, "val/loss": v} for step, v in enumerate(values))]
    run_dir, script = tmp_path / "lr.0", tmp_path / "job.py"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    script.write_text("")
    config = Config(run="lr", runs_dir=str(tmp_path))
    config.launch.processes = 1
    if isinstance(result, str):
        with pytest.raises(JobFailed, match=result):
            run_job(str(script), config, [], 0)
    else:
        assert run_job(str(script), config, [], 0) == pytest.approx(result, nan_ok=True)


def start(folder: Path, overrides: str) -> subprocess.CompletedProcess[str]:
    places = (
        f"runs_dir={folder} data.path={folder / 'text'} data.cache_dir={folder / 'cache'} hydra.sweep.dir={folder}/m"
    )
    words = f"{MODEL} {SIZE} {places} logger=none sample_tokens=0 steps=2 eval_every=2 {overrides}".split()
    command = [sys.executable, "train.py", "--multirun", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_multirun_trains_every_combination_and_reports_those_that_fail(tmp_path: Path) -> None:
    write_text(tmp_path)
    done = start(tmp_path, "run=seeds seed=1,-2,3")
    assert done.returncode != 0
    assert "job 1 (run=seeds.1) ended with exit code" in done.stderr
    assert "seed=-2 must be between" in done.stderr
    first, third = (losses(tmp_path / f"seeds.{number}")["train/loss"] for number in (0, 2))
    assert first.keys() == third.keys() == {1, 2}
    assert first != third
    assert not (tmp_path / "seeds.1").exists()


def test_the_sweep_file_makes_commands_that_compose(monkeypatch: pytest.MonkeyPatch) -> None:
    """What W&B's agent would start, with its own code, up to torchrun, which is left out."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "launch" / "wandb_sweep.yaml").read_text())
    chosen = {"optim.lr": {"value": 0.002}, "balance.bias_rate": {"value": 0.01}}
    assert chosen.keys() == sweep["parameters"].keys()
    arguments = create_sweep_command_args({"args": chosen})
    words = [
        word
        for chunk in create_sweep_command(sweep["command"])
        for word in {
            "${env}": [],
            "${program}": [sweep["program"]],
            "${args_no_hyphens}": arguments["args_no_hyphens"],
        }.get(chunk, [chunk])
    ]
    assert words[0] == "torchrun"
    program = words[words.index("train.py") :]
    environment = {**os.environ, "WANDB_RUN_ID": "abc123", "WANDB_SWEEP_ID": "s"}
    command = [sys.executable, *program, "--cfg", "job", "--resolve"]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    composed = yaml.safe_load(shown.stdout)
    assert composed["run"] == "sweep_abc123"
    assert composed["logger"]["mode"] == "online"
    assert (composed["optim"]["lr"], composed["balance"]["bias_rate"]) == (0.002, 0.01)
