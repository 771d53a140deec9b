"""A rank is killed in mid-run: everything ends soon, says in which step, and the same command goes on bit for bit.

Real torchrun, real SIGKILL. The undisturbed run that the others are compared with is made once.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.job import Job, checkpoints, losses, steps_done, write_text

STEPS = 36
LOOP = f"steps={STEPS} save_every=3 eval_every=6 sample_tokens=0 logger=none"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a little text, and the undisturbed run in `whole`."""
    made = tmp_path_factory.mktemp("faults")
    write_text(made)
    with Job(made, "whole", LOOP) as job:
        job.finish()
    assert len(losses(made / "whole")["train/loss"]) == STEPS
    return made


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_and_the_next_one_goes_on_bit_for_bit(folder: Path, victim: int) -> None:
    run_dir = folder / f"killed_{victim}"
    with Job(folder, run_dir.name, LOOP) as job:
        job.wait_until(lambda: steps_done(run_dir) >= 4 and bool(checkpoints(run_dir)))
        done = steps_done(run_dir)
        assert job.kill(victim) != 0
        said = re.search(rf"\[rank {1 - victim}\] .* in step (\d+)", job.output)
    assert said is not None, job.output
    assert done <= int(said[1]) <= steps_done(run_dir) + 2, (done, said[0])
    assert f"{run_dir / 'checkpoints'} is whole; the same command goes on" in job.output
    assert steps_done(run_dir) < STEPS, "it was killed too late to prove anything"
    with Job(folder, run_dir.name, LOOP) as job:
        job.finish()
    assert losses(run_dir) == losses(folder / "whole")


def test_a_kill_while_saving_leaves_the_last_checkpoint_usable(folder: Path) -> None:
    """Killed between the start of the second save and its rename: what is half written is not taken, and goes."""
    run_dir = folder / "torn"
    writing = run_dir / "checkpoints"
    with Job(folder, run_dir.name, LOOP) as job:
        job.wait_until(lambda: checkpoints(run_dir) != [] and any(writing.glob(".writing_*")))
        assert job.kill(0, 1) != 0
    half = writing / ".writing_step_00009999"  # and one that surely is torn, whatever the moment of the kill was
    half.mkdir(exist_ok=True)
    (half / "__0_0.distcp").write_bytes(b"\0" * 100)
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 23, "train/lo')
    with Job(folder, run_dir.name, LOOP) as job:
        job.finish()
    assert losses(run_dir) == losses(folder / "whole")
    assert not list(writing.glob(".writing_*"))
