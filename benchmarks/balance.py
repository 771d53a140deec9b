"""Balance by bias, by auxiliary loss, not at all: validation loss and global MaxVio from the same seed.

    .venv/bin/python -m benchmarks.balance [--runs-dir runs/balance] [--jobs 2] [--set steps=400 ...]

Runs `train.py experiment=balance` once per method, real text, 32 experts (conf/experiment/balance.yaml), each in one
process with one thread, so that `--jobs 2` uses two cores. A run that has finished is not run
again: the same command goes on after an interruption, and only draws when all are there.

Prints a table, writes benchmarks/results/balance.json and docs/balance.png.
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


def train(runs_dir: Path, method: str, overrides: Sequence[str]) -> None:
    """One run in a process of its own; it goes on from its newest checkpoint, or ends at once if it is finished."""
    command = [sys.executable, "train.py", "experiment=balance", *METHODS[method], f"run={run_name(method)}"]
    command += [f"runs_dir={runs_dir}", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_name(method: str) -> str:
    return method.replace(" ", "_")


def series(runs_dir: Path, method: str, metric: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric of one run."""
    lines = (runs_dir / run_name(method) / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if metric in row]
    return [row["step"] for row in rows], [row[metric] for row in rows]


def draw(runs_dir: Path, picture: Path) -> None:
    """Validation loss above what the best method has at that moment, and the two MaxVio, against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4), dpi=120, layout="constrained")
    for method, colour in COLOURS.items():
        steps, loss = series(runs_dir, method, "val/loss")
        late = [i for i, step in enumerate(steps) if step >= steps[-1] // 4]
        left.plot([steps[i] for i in late], [loss[i] for i in late], color=colour, marker=".", label=method)
        middle.plot(*series(runs_dir, method, "val_balance/max_vio_global"), color=colour, marker=".", label=method)
        right.plot(*series(runs_dir, method, "balance/max_vio"), color=colour, linewidth=0.8, label=method)
    left.set_title("validation loss, nats per byte")
    middle.set_title("global MaxVio on the validation text, worst layer")
    right.set_title("MaxVio of each training batch, worst layer")
    middle.axhline(0.2, color="black", linewidth=0.6, linestyle=":")
    for axes in (middle, right):
        axes.set_yscale("log")
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(picture)
    pyplot.close(figure)


def last(runs_dir: Path, method: str, metric: str) -> float:
    return series(runs_dir, method, metric)[1][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/balance"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides for every run")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "balance.png")
    options = parser.parse_args()
    runs_dir = options.runs_dir.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda method: train(runs_dir, method, options.set), METHODS))
    columns = {
        "val loss": "val/loss",
        "MaxVio global": "val_balance/max_vio_global",
        "MaxVio batch": "val_balance/max_vio",
        "dead experts": "val_balance/dead_experts",
        "entropy": "val_balance/entropy",
    }
    table = {method: {c: last(runs_dir, method, metric) for c, metric in columns.items()} for method in METHODS}
    print(f"{'':12}{''.join(f'{c:>15}' for c in columns)}{'train MaxVio':>15}")
    for method, row in table.items():
        recent = statistics.median(series(runs_dir, method, "balance/max_vio")[1][-40:])
        print(f"{method:12}{''.join(f'{value:15.4f}' for value in row.values())}{recent:15.4f}")
    draw(runs_dir, options.picture)
    ours = table["bias"]
    rows = [Row("validation loss", "nats per byte", ours["val loss"], m, table[m]["val loss"]) for m in METHODS]
    rows += [Row("global MaxVio", "worst layer", ours["MaxVio global"], m, table[m]["MaxVio global"]) for m in METHODS]
    print()
    publish("balance", rows[1 : len(METHODS)] + rows[len(METHODS) + 1 :])


if __name__ == "__main__":
    main()
