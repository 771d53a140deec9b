"""Tokens per second of the quickstart's model: DualPipe on two processes against one process with two threads.

    .venv/bin/python -m benchmarks.quickstart [--steps 12] [--rounds 3]

Same model, same data, same global batch, same optimizer; both are real runs of train.py, taken in turns, and the
median step of each is compared (the first steps are left out). The peer is this project's own model without any
pipeline: one stage, 1F1B on one rank, so the ratio is what splitting the work over processes costs or gains.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import Row, publish

WARM_UP = 3
ROOT = Path(__file__).parent.parent
SERIAL = ["parallel.pp=1", "schedule=one_f_one_b", "launch.threads=2"]
PHASES = ("pipeline", "reduce", "update", "other")


def measure(processes: int, overrides: list[str], steps: int, folder: str) -> list[dict[str, float]]:
    """Run train.py and return the metrics of its steps after the warm-up."""
    run = f"p{processes}"
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "train.py"]
    command += [f"run={run}", f"runs_dir={folder}", f"steps={steps}", "eval_every=1000", "save_every=1000"]
    command += ["logger=none", "sample_tokens=0", "eval_batches=1", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in (Path(folder) / run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss" in row][WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    pipeline: list[dict[str, float]] = []
    serial: list[dict[str, float]] = []
    for _ in range(options.rounds):
        for rows, processes, overrides in ((pipeline, 2, []), (serial, 1, SERIAL)):
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(processes, overrides, options.steps, folder)
    speed, peer = (statistics.median(r["train/tokens_per_second"] for r in rows) for rows in (pipeline, serial))
    publish("quickstart", [Row("quickstart model", "tokens/s", speed, "one process, two threads", peer)])
    print("\nwhere a median step goes, in ms:")
    print(f"{'':26}{''.join(f'{phase:>10}' for phase in PHASES)}")
    for name, rows in (("DualPipe, two processes", pipeline), ("one process, two threads", serial)):
        times = [1e3 * statistics.median(r[f"seconds/{phase}"] for r in rows) for phase in PHASES]
        print(f"{name:26}{''.join(f'{time:10.1f}' for time in times)}")


if __name__ == "__main__":
    main()
