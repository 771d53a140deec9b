"""Does training in FP8 reach the loss of BF16? The report's check (3.3, appendix B.1) at the size of a laptop.

    .venv/bin/python -m benchmarks.fp8_training run tiny fp8       # one run; all of them take hours
    .venv/bin/python -m benchmarks.fp8_training report             # table and picture of the runs that are there

Every run of a model starts from the same weights and reads the same text in the same order; only the precision
differs. The text is read less than once, so the training loss is an honest measure. Adam's moments are BF16 in all.

    blocks   activation gradients in 128×128 blocks instead of 1×128 tiles: the report's ablation, which diverged at 16B
    fp32     how far two runs drift apart that differ by rounding of BF16 alone: the noise of the comparison
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

RUNS = Path("runs/fp8_training")
STEPS = 1000
WINDOW = 200  # steps over which a loss is averaged
COMMON = (
    "parallel.pp=1 schedule=one_f_one_b schedule.micro_batches=1 launch.threads=1 logger=none sample_tokens=0 "
    "data.val_fraction=0.3 optim.lr=5e-4 optim.lr_final=5e-5 optim.warmup_steps=100 optim.moments=bf16 "
    "eval_every=250 eval_batches=8 save_every=1000"
)
LATER = "optim.lr=1e-4 optim.lr_final=1e-5 seed=10 init_from=runs/fp8_training"
MODELS = {
    "tiny": "model=tiny data.micro_batch_size=4",
    "wider": "model=small model.num_layers=5 model.num_experts=8 model.num_groups=4 model.num_heads=4 "
    "model.dense_ffn_size=512 data.micro_batch_size=2",
}
MODELS |= {f"{name}_later": f"{words} {LATER}/{name}-bf16-0" for name, words in MODELS.items()}
VARIANTS = {
    "bf16": "precision=bf16",
    "fp8": "precision=fp8",
    "blocks": "precision=fp8 precision.gradient_blocks=true",
    "fp32": "precision=fp32",
}


@dataclass(frozen=True)
class Losses:
    """Training losses of all steps, and validation losses by step."""

    train: list[float]
    val: dict[int, float]

    @staticmethod
    def read(model: str, variant: str) -> Losses | None:
        """None if that run is not there or not finished."""
        path = RUNS / f"{model}-{variant}" / "metrics.jsonl"
        if not path.exists():
            return None
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        train = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
        val = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
        return Losses([train[s] for s in sorted(train)], val) if len(train) == STEPS else None

    def smoothed(self, end: int) -> float:
        """The mean over the last WINDOW steps up to this one."""
        return sum(self.train[end - WINDOW : end]) / WINDOW


def run(model: str, variant: str, seed: str = "0") -> None:
    name = f"{model}-{variant}-{seed}"
    words = f"{COMMON} seed={seed} {MODELS[model]} {VARIANTS[variant]} steps={STEPS} runs_dir={RUNS} run={name}"
    subprocess.run([sys.executable, "train.py", *words.split()], check=True)
