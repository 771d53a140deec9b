"""The suite's own tools: two pytest workers (tests/conftest.py), a fork server, work shared out (tests/spawn.py)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.spawn import run_ranks, share_out

FILE = """
import json, os, time
from pathlib import Path
import pytest

@pytest.fixture(scope="module")
def log():
    with Path(__file__).with_suffix(".jsonl").open("w") as file:
        yield file

@pytest.fixture(scope="module")
def children():
    pids = []
    yield pids
    for pid in pids:
        os.kill(pid, 9)
        os.waitpid(pid, 0)

def stay(log, name):
    began = time.monotonic()
    time.sleep(0.2)
    log.write(json.dumps([name, began, time.monotonic(), os.getpid()]) + "\\n")

@pytest.mark.alone
def test_first(log, children):
    pid = os.fork()
    if pid == 0:  # it outlives the test, and must not keep the others away
        time.sleep(600)
    children.append(pid)
    stay(log, "alone")

@pytest.mark.parametrize("number", range(5))
def test_others(log, number):
    stay(log, "beside")

@pytest.mark.alone
def test_last(log):
    stay(log, "alone")
"""


def test_what_is_marked_alone_has_nothing_beside_it(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    alone\n    slow\n")
    for number in range(2):
        (tmp_path / f"test_{number}.py").write_text(FILE)
    command = [sys.executable, "-m", "pytest", "-q", "--numprocesses=2", "--dist=loadfile", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "14 passed" in done.stdout, done.stdout + done.stderr
    logs = [[json.loads(line) for line in (tmp_path / f"test_{n}.jsonl").read_text().splitlines()] for n in range(2)]
    assert [len({pid for *_, pid in log}) for log in logs] == [1, 1], "a file stays with one worker"
    together = {(a[0], b[0]) for a in logs[0] for b in logs[1] if a[1] < b[2] and b[1] < a[2]}
    assert together == {("beside", "beside")}


def loaded_and_shared(rank: int, world: int) -> tuple[bool, list[tuple[int, int]]]:
    return "torch._dynamo" in sys.modules, share_out(rank, world, lambda item: (item, rank), list(range(5)))


def test_ranks_start_with_everything_imported_and_share_work_out() -> None:
    """multiprocessing says nothing if the fork server's imports fail; tests only take twice as long."""
    shared = [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
    assert run_ranks(2, loaded_and_shared) == [(True, shared)] * 2
