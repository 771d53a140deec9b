"""Balance by bias, by auxiliary loss, not at all: loss and MaxVio from the same seed.

    .venv/bin/python -m benchmarks.balance [--runs-dir runs/balance] [--seeds 0] [--jobs 2] [--set steps=400 ...]

Runs `train.py experiment=balance` once per method and seed, real text, 32 experts (conf/experiment/balance.yaml), each
in one process with one thread, so that `--jobs 2` uses two cores. The same command goes on after an interruption; runs
that have finished are only evaluated again.

Prints a table, writes benchmarks/results/balance.json and docs/images/balance.png. Fresh loss is the training loss of
the last 100 steps: the runs take less than an epoch, so every batch is text that the model sees for the first time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from benchmarks.report import Row, publish

ROOT = Path(__file__).parent.parent
METHODS = {
    "bias": ["balance=bias"],
    "aux 0.001": ["balance=aux"],
    "aux 0.01": ["balance=aux", "balance.aux_loss=0.01"],
    "none": ["balance=none"],
}
COLOURS = {"bias": "#1f4e8c", "aux 0.001": "#e0a030", "aux 0.01": "#b2202c", "none": "#777777"}
COLUMNS = {  # of the table: metric, and over how many of its last values the mean is taken
    "val loss": ("val/loss", 1),
    "fresh loss": ("train/loss", 100),
    "MaxVio val": ("val_balance/max_vio_global", 1),
    "MaxVio train": ("balance/max_vio_global", 1),
    "MaxVio batch": ("balance/max_vio", 40),
    "dead experts": ("val_balance/dead_experts", 1),
    "entropy": ("val_balance/entropy", 1),
}


def train(runs_dir: Path, method: str, seed: int, overrides: Sequence[str]) -> None:
    """One run in a process of its own; it goes on from its newest checkpoint, or ends at once if it is finished."""
    command = [sys.executable, "train.py", "experiment=balance", *METHODS[method], f"seed={seed}"]
    command += [f"run={run_name(method, seed)}", f"runs_dir={runs_dir}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=environment)


def run_name(method: str, seed: int) -> str:
    return f"{method.replace(' ', '_')}_seed{seed}"


def series(runs_dir: Path, method: str, seed: int, metric: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric of one run."""
    lines = (runs_dir / run_name(method, seed) / "metrics.jsonl").read_text().splitlines()
    values = {row["step"]: row[metric] for row in map(json.loads, lines) if metric in row}
    return list(values), list(values.values())


def draw(runs_dir: Path, seed: int, picture: Path) -> None:
    """Of one seed against the step: loss on fresh text, and MaxVio of validation and of each batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4), dpi=110, layout="constrained")
    _, peer = series(runs_dir, "none", seed, "train/loss")
    for method, colour in COLOURS.items():
        steps, loss = series(runs_dir, method, seed, "train/loss")
        gap = [ours - theirs for ours, theirs in zip(loss, peer, strict=True)]
        means = [statistics.mean(gap[end - 40 : end]) for end in range(40, len(gap) + 1)]
        left.plot(steps[39:], means, color=colour, label=method)
        middle.plot(*series(runs_dir, method, seed, "val_balance/max_vio_global"), color=colour, marker=".")
        right.plot(*series(runs_dir, method, seed, "balance/max_vio"), color=colour, linewidth=0.8)
    left.set_title("fresh loss less that without balancing, 40 steps")
    middle.set_title("global MaxVio on the validation text, worst layer")
    right.set_title("MaxVio of each training batch, worst layer")
    for axes in (middle, right):
        axes.set_yscale("log")
        axes.axhline(0.2, color="black", linewidth=0.6, linestyle=":")
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/balance"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides for every run")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "balance.png")
    options = parser.parse_args()
    runs_dir = options.runs_dir.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = product(options.seeds, METHODS)
        list(pool.map(lambda job: train(runs_dir, job[1], job[0], options.set), jobs))
    print(f"{'':18}{''.join(f'{column:>14}' for column in COLUMNS)}")
    means = {method: dict.fromkeys(COLUMNS, 0.0) for method in METHODS}
    for method, seed in product(METHODS, options.seeds):
        row = {
            column: statistics.mean(series(runs_dir, method, seed, metric)[1][-count:])
            for column, (metric, count) in COLUMNS.items()
        }
        print(f"{method + f', seed {seed}':18}{''.join(f'{value:14.4f}' for value in row.values())}")
        for column, value in row.items():
            means[method][column] += value / len(options.seeds)
    draw(runs_dir, options.seeds[0], options.picture)
    print("\nmeans over seeds:")
    rows = [
        Row(column, "nats per byte" if "loss" in column else "worst layer", ours, method, means[method][column])
        for column, ours in means["bias"].items()
        for method in METHODS
        if method != "bias" and column in ("val loss", "fresh loss", "MaxVio val", "MaxVio train")
    ]
    publish("balance", rows)


if __name__ == "__main__":
    main()
