"""A disk that is full, or cannot be written, stops a run in order: one message, exit code 1, what was saved stays.

Real small disks (tmpfs), so Linux and root only; the rest runs anywhere.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from parallel.fragments import Fragment
from parallel.mesh import Layout, Mesh
from parallel.saved import CheckpointError, RunState
from tests.job import Job, checkpoints, losses, write_text
from training.checkpoint_writer import CheckpointWriter
from training.run_dir import check_writable

LOOP = "steps=60 save_every=4 eval_every=60 sample_tokens=0 logger=none"
needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk (tmpfs) needs Linux and root"
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB with a little text on it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], check=True)
    try:
        write_text(folder)
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Take all room on a disk but `leave` bytes, or as much as a job that goes on writing lets be taken."""
    with (disk / "filler").open("wb") as file:
        while (room := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - leave) > 0:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, room)
            except OSError as error:
                if error.errno != errno.ENOSPC:  # else the job has taken some of it meanwhile: try what is left
                    raise


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("leave", [0, 65536])
def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(disk: Path, leave: int) -> None:
    """Without any room the metrics fail first; with a little the next checkpoint does."""
    run_dir = disk / "full"
    with Job(disk, "full", LOOP) as job:
        job.wait_until(lambda: checkpoints(run_dir) != [])
        fill(disk, leave)
        assert job.torchrun.wait(timeout=120) != 0
        output = job.output
    assert "stopped after step" in output and "No space left on device" in output, output
    assert "The newest checkpoint in" in output and "is whole" in output
    assert "training/trainer.py" not in output, output
    assert not list((run_dir / "checkpoints").glob(".writing_*")), "a torn checkpoint keeps room"
    newest = int(checkpoints(run_dir)[-1].removeprefix("step_"))
    (disk / "filler").unlink()
    with Job(disk, "full", f"{LOOP} steps={newest + 2}") as job:
        job.finish()
    assert sorted(losses(run_dir)["train/loss"]) == list(range(1, newest + 3)), "no step may be missing or doubled"


@needs_root
@pytest.mark.parametrize("leave", [0, 1000, 65536, 1 << 20])
def test_a_save_without_room_says_so(disk: Path, leave: int) -> None:
    """Whatever torch's writer says of it, which depends on the byte at which the disk is full."""
    writer = CheckpointWriter(disk / "checkpoints", Mesh(Layout(1, 1, 1), 0, None, None, None, None, None), keep_last=1)
    (disk / "checkpoints").mkdir()
    fill(disk, leave)
    writer.save(RunState(1, 4, 40, 1, {}, "id", 1), [Fragment("w", (1 << 20,), 0, torch.ones(1 << 20))])
    with pytest.raises(CheckpointError, match=r"No space left on device"):
        writer.close()
    assert list((disk / "checkpoints").iterdir()) == []


@needs_root
@pytest.mark.slow
def test_a_read_only_folder_is_refused_at_the_start(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with Job(disk.parent, "refused", f"{LOOP} runs_dir={disk} data.path={disk / 'text'}") as job:
        assert job.torchrun.wait(timeout=120) != 0
        assert f"error: {disk / 'refused'} cannot be written (Read-only file system)" in job.output, job.output
        assert "training/trainer.py" not in job.output, job.output


def test_a_folder_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"runs_dir=…"):
        check_writable(tmp_path / "file" / "run")
