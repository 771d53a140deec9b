"""What a newcomer sees: the report at the end of a run names things that exist, and the command it prints works."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.job import ROOT, Job, losses, write_text


@pytest.mark.slow
def test_the_report_names_what_exists_and_its_command_goes_on(tmp_path: Path) -> None:
    write_text(tmp_path)
    with Job(tmp_path, "first", "steps=4 eval_every=4 sample_tokens=20") as job:
        output = job.finish()
    lines = output.splitlines()
    said = {name: next(li for li in lines if li.startswith(name))[len(name) :].strip() for name in REPORTED}
    assert Path(said["checkpoint"]).name == "step_00000004"
    for name in ("checkpoint", "metrics", "W&B run"):
        assert Path(said[name]).exists(), said[name]
    final = losses(tmp_path / "first")["val/loss"][4]
    assert said["validation loss"].startswith(f"{final:.4f} nats per byte")
    assert any(line.startswith("import ") for line in lines), "no sample of text"
    assert (tmp_path / "first" / "curve.png").stat().st_size > 1000

    command = shlex.split(said["resume"])
    assert "steps=8" in command
    subprocess.run([*command, "logger=none"], cwd=ROOT, check=True, timeout=180, capture_output=True)
    assert sorted(losses(tmp_path / "first")["train/loss"]) == list(range(1, 9))


REPORTED = ("validation loss", "checkpoint", "metrics", "W&B run", "resume")
