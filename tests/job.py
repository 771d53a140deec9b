"""A real training run for tests: torchrun, a model of a few thousand parameters, and what it wrote.

Nothing outlives a `with Job(...)` block, whatever becomes of the run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
MODEL = (
    "model.num_layers=2 model.hidden_size=32 model.dense_ffn_size=48 model.num_heads=2 model.query_rank=16 "
    "model.key_value_rank=16 model.head_dim=8 model.rope_dim=4 model.value_dim=8 model.num_experts=4 "
    "model.experts_per_token=2 model.num_groups=2 model.expert_ffn_size=16"
)
SIZE = "eval_batches=1 data.seq_len=32 data.micro_batch_size=1 launch.timeout_seconds=20"
COMPARED = ("train/loss", "val/loss", "train/grad_norm", "train/lr", "balance/max_vio", "balance/max_vio_global")
ENDS_WITHIN = 30  # seconds from the kill to the end of the last process: the promise of the README


class Job:
    """`torchrun … train.py` with a small model, in a session of its own; its output goes to a file.

    It trains on the files in `folder/text` and keeps everything in `folder`. `command` starts it in another way, with
    more variables in its `environment`.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        overrides: str,
        command: Sequence[str] = (*TORCHRUN, "train.py"),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.run_dir = folder / run
        self._output = folder / f"{run}.{time.monotonic_ns()}.log"
        places = f"run={run} runs_dir={folder} data.path={folder / 'text'} data.cache_dir={folder / 'cache'}"
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        with self._output.open("w") as output:
            self.torchrun = subprocess.Popen(
                [*command, *f"{MODEL} {SIZE} {places} {overrides}".split()],
                cwd=ROOT,
                env={**inherited, "OMP_NUM_THREADS": "1", "TEST_JOB": str(self._output), **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def rank(self, number: int) -> psutil.Process:
        """The process of one rank."""
        for child in psutil.Process(self.torchrun.pid).children(recursive=True):
            if child.environ().get("RANK") == str(number):
                return child
        raise AssertionError(f"rank {number} is not running:\n{self.output}")

    def kill(self, *ranks: int) -> int:
        """SIGKILL to these ranks. Returns torchrun's exit code once all have ended, which must be soon."""
        children = psutil.Process(self.torchrun.pid).children(recursive=True)
        victims = [self.rank(number) for number in ranks]
        deadline = time.monotonic() + ENDS_WITHIN
        for victim in victims:
            victim.kill()
        code = self.torchrun.wait(timeout=ENDS_WITHIN)
        _, alive = psutil.wait_procs(children, timeout=max(0.0, deadline - time.monotonic()))
        assert not alive, f"still there {ENDS_WITHIN} s after the kill: {alive}\n{self.output}"
        return code

    def wait_until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not happened():
            assert self.torchrun.poll() is None, f"ended too early:\n{self.output}"
            assert time.monotonic() < deadline, f"nothing happened:\n{self.output}"
            time.sleep(0.01)

    def finish(self) -> str:
        """Wait for a good end."""
        code = self.torchrun.wait(timeout=180)
        assert code == 0, self.output
        return self.output

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing outlives a test: what this job started has its mark in the environment, in whatever session it is."""
        for process in psutil.process_iter(["pid"]):
            with suppress(psutil.Error):
                if process.environ().get("TEST_JOB") == str(self._output):
                    process.kill()
        self.torchrun.wait()


def losses(run_dir: Path) -> dict[str, dict[int, float]]:
    """Training and validation losses, gradient norms and imbalance, by step, exactly as written."""
    path = run_dir / "metrics.jsonl"
    found: dict[str, dict[int, float]] = {}
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        if line.endswith("\n"):
            row = json.loads(line)
            for name in COMPARED:
                if name in row:
                    assert row["step"] not in found.setdefault(name, {}), f"step {row['step']} is there twice"
                    found[name][row["step"]] = row[name]
    return found


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return max(losses(run_dir).get("train/loss", {0: 0.0})) if path.exists() else 0


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").glob("step_*"))


def write_text(folder: Path) -> None:
    """Some text to train on."""
    (folder / "text").mkdir()
    for number, source in enumerate(sorted((ROOT / "dualpipe").glob("*.py"))[:6]):
        (folder / "text" / f"{number}.txt").write_text(source.read_text())
