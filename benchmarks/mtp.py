"""What multi-token prediction does to the loss of `tiny`: the same run with it and without, same seed, same data.

    .venv/bin/python -m benchmarks.mtp [--steps 120]

Two runs of train.py side by side, one process and one thread each; draws docs/images/mtp.png. The curves are of the
main model's loss, and of the MTP module, which sees the token before the one that it predicts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import RESULTS
from training.curve import read_metric

ROOT = Path(__file__).parent.parent
SETTINGS = [
    "parallel.pp=1", "schedule=one_f_one_b", "launch.threads=1", "logger=none", "sample_tokens=0", "data.seq_len=128",
    "data.micro_batch_size=4", "optim.warmup_steps=20", "eval_every=15", "eval_batches=4", "save_every=100000",
]  # fmt: skip


def train(folder: str, steps: int) -> dict[int, Path]:
    """Train with MTP depth 0 and 1 at the same time; returns the metrics of each."""
    running = {}
    for depth in (0, 1):
        words = [f"model.mtp_depth={depth}", f"run=mtp{depth}", f"runs_dir={folder}", f"steps={steps}", *SETTINGS]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "train.py", *words]
        running[depth] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    for depth, process in running.items():
        if process.wait():
            raise RuntimeError(f"the run with MTP depth {depth} failed with exit code {process.returncode}")
    return {depth: Path(folder) / f"mtp{depth}" / "metrics.jsonl" for depth in running}


def draw(metrics: dict[int, Path], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110, layout="constrained")
    for depth, color, name in ((0, "#9a9a9a", "without MTP"), (1, "#1f4e8c", "with MTP")):
        axes.plot(*read_metric(metrics[depth], "train/loss"), color=color, linewidth=0.7, alpha=0.5)
        axes.plot(*read_metric(metrics[depth], "val/loss"), color=color, marker="o", label=f"{name}, validation")
    axes.plot(
        *read_metric(metrics[1], "train/mtp_loss_1"), color="#c26d2d", linewidth=0.9, label="the MTP module, training"
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per byte")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(folder, options.steps)
        draw(metrics, ROOT / "docs" / "images" / "mtp.png")
        last = {depth: read_metric(path, "val/loss")[1][-1] for depth, path in metrics.items()}
        module = read_metric(metrics[1], "train/mtp_loss_1")[1][-1]
    print(f"validation loss after {options.steps} steps: {last[0]:.4f} without MTP, {last[1]:.4f} with")
    print(f"training loss of the MTP module in the last step: {module:.4f}")
    data = {"steps": options.steps, "without": last[0], "with": last[1], "module": module}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "mtp.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
