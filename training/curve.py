"""The loss curve of a run as a picture, from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path


def read_metric(path: Path, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric in a metrics file; a value that is not finite stands there as a word."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    points = [(row["step"], float(row[name])) for row in rows if name in row]
    return [s for s, _ in points], [v for _, v in points]


def draw_curve(metrics: Path, picture: Path, title: str) -> None:
    """Training and validation loss against the step, in nats per token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    axes.plot(*read_metric(metrics, "train/loss"), color="#9db4d0", linewidth=1, label="training")
    axes.plot(*read_metric(metrics, "val/loss"), color="#1f4e8c", linewidth=2, marker="o", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per byte")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(picture)
    pyplot.close(figure)
