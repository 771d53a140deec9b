"""Are FP8's gradients those of FP32, on average? Both, and BF16's, at the same trained weights on the same text.

    .venv/bin/python -m benchmarks.fp8_training run wider bf16 0     # makes the weights: about 6 minutes
    .venv/bin/python -m benchmarks.fp8_gradients [--batches 24]

Gradients are summed over all batches, which averages rounding noise away and leaves what is systematic. Per kind of
weight, over all layers: the projection ⟨g, g32⟩ ÷ ⟨g32, g32⟩, which is 1 for a gradient that is neither too long nor
too short on average, and the cosine between the two.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from hydra import compose, initialize
from torch import Tensor

from benchmarks.fp8_training import COMMON, MODELS, ROWS, RUNS
from benchmarks.report import Row, publish
from training.config import from_hydra, register_schemas
from training.stop import StopRequest
from training.trainer import Trainer, join_process_group, prepare

WEIGHTS = "wider-bf16-0"
KINDS = ("embedding", "attention.", "mlp.", "shared.", "experts.", "router.", "norm", "head")


def gradients(precision: str, batches: int, weights: Path, runs_dir: str) -> dict[str, Tensor]:
    """The sum of the gradients of so many steps that change nothing, by parameter."""
    words = f"{COMMON} schedule.micro_batches=1 data.micro_batch_size={ROWS['wider']} seed=0 {MODELS['wider']}".split()
    words = [word for word in words if not word.startswith(("eval_every", "save_every"))]
    words += [f"precision={precision}", f"steps={batches}", f"init_from={weights}", f"runs_dir={runs_dir}", "run=one"]
    with initialize(version_base="1.3", config_path="../conf"):
        job = prepare(from_hydra(compose(config_name="config", overrides=words)), 1)
    trainer = Trainer(job, join_process_group(job), StopRequest())
    total: dict[str, Tensor] = {}

    def keep(rate: float, scale: float = 1.0) -> None:
        for stage in trainer.replica.stages.values():
            for name, parameter in stage.named_parameters():
                assert parameter.grad is not None
                total[name] = total.get(name, 0) + parameter.grad.double()

    trainer.update.step = keep  # type: ignore[method-assign]
    for _ in range(batches):
        trainer._train_one_step()
    trainer.close()
    return total


def kind_of(name: str) -> str:
    if "norm" in name:
        return "norm"
    return next(kind for kind in KINDS if kind in name)


def compare(ours: dict[str, Tensor], exact: dict[str, Tensor], precision: str) -> list[Row]:
    """Two rows for each kind of weight, and two for all together."""
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    for name, theirs in exact.items():
        a, b = ours[name].flatten(), theirs.flatten()
        products = torch.stack((a @ b, a @ a, b @ b))
        for kind in (kind_of(name), "all"):
            sums[kind] += products
    rows = []
    for kind in (*KINDS, "all"):
        cross, own, other = sums[kind].tolist()
        case = f"{precision}, {kind.rstrip('.')}"
        rows.append(Row(case, "projection on FP32's gradient", cross / other, "no bias", 1.0))
        rows.append(Row(case, "cosine with FP32's gradient", cross / (own * other) ** 0.5, "the same", 1.0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=24)
    options = parser.parse_args()
    weights = RUNS / WEIGHTS
    if not weights.exists():
        sys.exit(f"{weights} is not there; make it with: python -m benchmarks.fp8_training run wider bf16 0")
    register_schemas()
    with tempfile.TemporaryDirectory() as folder:
        found = {p: gradients(p, options.batches, weights, folder) for p in ("fp32", "bf16", "fp8")}
    publish("fp8_gradients", [row for p in ("bf16", "fp8") for row in compare(found[p], found["fp32"], p)])


if __name__ == "__main__":
    main()
