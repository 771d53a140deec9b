"""An error that all ranks of a torchrun find is said by rank 0, even if it finds it last (parallel/last_word.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import os, signal, sys, time
from training.outcome import end_on_purpose

if os.environ["RANK"] == "0":
    time.sleep(3)
    print("error: what all have found", file=sys.stderr, flush=True)
else:
    signal.signal(signal.SIGTERM, lambda *_: None)  # as a run that would stop in order
sys.exit(end_on_purpose(2))
"""


@pytest.mark.slow
@pytest.mark.parametrize("by_script", [False, True])
def test_rank_0_is_not_ended_before_it_has_spoken(by_script: bool, tmp_path: Path) -> None:
    """Nor do the others stay behind: torchrun would give them longer than `timeout`. Under the launch script all end
    with 0 anyway."""
    script = tmp_path / "late.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if by_script:
        environment["OUTCOME_FILE"] = str(tmp_path / "outcome")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.stderr.count("error: what all have found") == 1
    assert (done.returncode == 0) == by_script
