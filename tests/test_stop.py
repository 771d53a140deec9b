"""Signals and stalls: a signal to any one rank saves and ends the run, a rank that hangs is given up."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.mesh import Layout, Mesh
from parallel.saved import CheckpointError
from tests.job import ROOT, Job, checkpoints, losses, steps_done, write_text
from tests.spawn import run_ranks
from training.config import Config
from training.resume import find_resume_point
from training.stop import Stop, StopRequest

STEPS = 60
LOOP = f"steps={STEPS} save_every=100 eval_every=10 sample_tokens=0 logger=none"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a little text, and the undisturbed run in `whole`."""
    made = tmp_path_factory.mktemp("stop")
    write_text(made)
    with Job(made, "whole", LOOP) as job:
        job.finish()
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("number", "victim"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_saves_and_ends_with_success(folder: Path, number: signal.Signals, victim: int) -> None:
    run_dir = folder / number.name
    with Job(folder, run_dir.name, LOOP) as job:
        job.wait_until(lambda: steps_done(run_dir) >= 3)
        job.rank(victim).send_signal(number)
        done = steps_done(run_dir)
        output = job.finish()
    said = re.search(rf"stopped after step (\d+) \(rank {victim}: received {number.name}\)", output)
    assert said is not None, output
    assert done <= int(said[1]) <= done + 2, (done, said[0])
    assert checkpoints(run_dir) == [f"step_{int(said[1]):08d}"]
    with Job(folder, run_dir.name, LOOP) as job:
        job.finish()
    assert losses(run_dir) == losses(folder / "whole")


CTRL_C = """
import os, signal, sys, time
from training.stop import StopRequest, stop_on_signals
stop_on_signals(StopRequest())
for pause in (0, 0.01, 1.1):
    time.sleep(pause)
    os.kill(os.getpid(), signal.SIGINT)
    print("alive", flush=True)
"""


def test_one_ctrl_c_that_comes_twice_is_one_and_a_second_one_ends_at_once() -> None:
    """The terminal sends it to all processes, and torchrun passes its own on to the ranks."""
    done = subprocess.run([sys.executable, "-c", CTRL_C], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "alive\nalive\n"), done.stderr


def _ask(rank: int, world: int, wishes: list[str]) -> list[Stop | None]:
    import torch.distributed as dist

    mesh = Mesh(Layout(world, world, 1), rank, None, None, None, None, dist.group.WORLD)
    request = StopRequest()
    first = request.agreed(mesh)
    if wishes[rank] == "leave":
        request.leave("asked")
    if wishes[rank] == "fail":
        request.fail("no space")
        request.leave("asked, but it is too late for a checkpoint")
    return [first, request.agreed(mesh)]


@pytest.mark.parametrize(
    ("wishes", "agreed"),
    [
        (["", "leave", "leave"], Stop("rank 1: asked", failed=False)),
        (["leave", "", "fail"], Stop("rank 2: no space", failed=True)),
        (["", "", ""], None),
    ],
)
def test_all_ranks_agree(wishes: list[str], agreed: Stop | None) -> None:
    assert run_ranks(3, _ask, wishes) == [[None, agreed]] * 3


@pytest.mark.slow
@pytest.mark.alone
def test_a_stalled_rank_is_given_up_and_the_ranks_start_again(folder: Path) -> None:
    """SIGSTOP: the peer gives up after launch.timeout_seconds, torchrun kills and restarts, from the checkpoint."""
    run_dir = folder / "stalled"
    overrides = f"{LOOP} save_every=4 launch.timeout_seconds=6"
    environment = {"NPROC_PER_NODE": "2", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    with Job(folder, run_dir.name, overrides, [str(ROOT / "launch" / "torchrun.sh")], environment) as job:
        job.wait_until(lambda: steps_done(run_dir) >= 2)
        victim = job.rank(1)
        job.wait_until(lambda: bool(checkpoints(run_dir)))
        victim.suspend()
        job.wait_until(lambda: "[rank 0] failed in step" in job.output)
        assert steps_done(run_dir) < STEPS, "it was stopped too late to prove anything"
        job.finish()
    assert losses(run_dir) == losses(folder / "whole")


def test_a_fresh_run_that_torchrun_starts_again_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """resume=never refuses checkpoints of an earlier run, not those that this one made before a crash."""
    (tmp_path / "run" / "checkpoints" / "step_00000003").mkdir(parents=True)
    config = replace(Config(), runs_dir=str(tmp_path), run="run", resume="never")
    with pytest.raises(ValueError, match="already has checkpoints"):
        find_resume_point(config, Layout(2, 2, 1))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(CheckpointError, match="no checkpoint in"):  # it looked, and this one is not whole
        find_resume_point(config, Layout(2, 2, 1))
