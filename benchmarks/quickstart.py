"""Tokens per second of the quickstart's model: DualPipe on two processes against one process.

    .venv/bin/python -m benchmarks.quickstart [--steps 12] [--rounds 3]

Same model, same data, same global batch, same optimizer; both are real runs of train.py, taken in turns, and the
median step of each is compared (the first steps are left out). The peer is this project's own model without any
pipeline: one stage, 1F1B on one rank. With two threads it uses the same cores, so that ratio is what the pipeline
costs or gains; twice its speed on one thread is the limit that no split over two cores can beat.
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
SERIAL = ["parallel.pp=1", "schedule=one_f_one_b"]
CASES = {  # name: processes, overrides
    "DualPipe, two processes": (2, ["launch.threads=1"]),
    "one process, two threads": (1, [*SERIAL, "launch.threads=2"]),
    "one process, one thread": (1, [*SERIAL, "launch.threads=1"]),
}
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
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for _ in range(options.rounds):
        for name, (processes, overrides) in CASES.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name] += measure(processes, overrides, options.steps, folder)
    ours, threads, single = (statistics.median(r["train/tokens_per_second"] for r in rows) for rows in found.values())
    case = ("quickstart model", "tokens/s", ours)
    publish(
        "quickstart",
        [Row(*case, "one process, two threads", threads), Row(*case, "limit: 2 × one process, one thread", 2 * single)],
    )
    print("\nwhere a median step goes, in ms:")
    print(f"{'':26}{''.join(f'{phase:>10}' for phase in PHASES)}")
    for name, rows in found.items():
        times = [1e3 * statistics.median(r[f"seconds/{phase}"] for r in rows) for phase in PHASES]
        print(f"{name:26}{''.join(f'{time:10.1f}' for time in times)}")


if __name__ == "__main__":
    main()
