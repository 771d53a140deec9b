"""Does training in FP8 reach the loss of BF16? The report's check (3.3, appendix B.1) at the size of a laptop.

    .venv/bin/python -m benchmarks.fp8_training run tiny fp8 [SEED]   # one run of 1,000 steps: 10 minutes or more
    .venv/bin/python -m benchmarks.fp8_training report [MODEL …]   # table and picture of the runs that are there
    .venv/bin/python -m benchmarks.fp8_training behind             # the published differences, in steps

Runs of a model and seed start from the same weights and read the same text in the same order; only the precision
differs. The text is read less than once, so the training loss is an honest measure. Adam's moments are BF16 in all.
The runs called `later` go on for 1,000 steps from what `bf16` has reached, on text in another order. Those called
`same` only evaluate what `bf16` of that seed has reached, in each precision: no run drifts there. `long` is from
scratch for 2,000 steps, `longer` for 4,000, `batch` from scratch with four times the sequences in a step, `scaled` from
scratch with first weights as large as the report's are for layers of this width.

    blocks   activation gradients in 128×128 blocks instead of 1×128 tiles: the report's ablation, which diverged at 16B
    fp32     how far two runs drift apart that differ by rounding of BF16 alone
    split    BF16 again, each step in two micro-batches: the same sums in another order
    nudged   BF16 again, at a learning rate larger by one part in a million. What these two differ from BF16 is the
             noise of the comparison

A difference in loss says little without how fast the loss falls. One that falls by a fifth while the steps double is
0.3 % higher if everything comes 1 % later; that of a large model late in training hardly is. `behind` divides by that
slope, and says how many percent more steps a variant needs for BF16's loss.

The learning rate is the report's, 2.2e-4. At 5e-4 runs that differ by one rounding end a percent apart.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.report import RESULTS, Row, publish

RUNS = Path("runs/fp8_training")
STEPS, LONG, LONGER = 1000, 2000, 4000
WINDOW = 200  # steps over which a loss is averaged
COMMON = (
    "parallel.pp=1 schedule=one_f_one_b launch.threads=1 logger=none sample_tokens=0 "
    "data.val_fraction=0.3 optim.lr=2.2e-4 optim.lr_final=2.2e-5 optim.warmup_steps=100 optim.moments=bf16 "
    "eval_every=500 eval_batches=64 save_every=1000"
)
LATER = "optim.lr=1e-4 optim.lr_final=1e-5 seed=1{seed} init_from=runs/fp8_training"
MODELS = {
    "tiny": "model=tiny",
    "wider": "model=small model.num_layers=5 model.num_experts=8 model.num_groups=4 model.num_heads=4 "
    "model.dense_ffn_size=512",
}
SCALED = {"tiny": 0.0449, "wider": 0.0317}  # 0.006 · √(7168 / hidden size): the report's, for narrower layers
ROWS = {"tiny": 4, "wider": 2}  # sequences in a step
SAME = "optim.lr=1e-12 optim.lr_final=1e-12 optim.warmup_steps=0 eval_every=1 init_from=runs/fp8_training"  # one step
MODELS |= {
    **{f"{name}_later": f"{words} {LATER}/{name}-bf16-{{seed}}" for name, words in MODELS.items()},
    **{f"{name}_long": words for name, words in MODELS.items()},
    **{f"{name}_longer": words for name, words in MODELS.items()},
    **{f"{name}_batch": words for name, words in MODELS.items()},
    **{f"{name}_scaled": f"{words} model.init_std={SCALED[name]}" for name, words in MODELS.items()},
    **{f"{name}_same": f"{words} {SAME}/{name}-bf16-{{seed}}" for name, words in MODELS.items()},
}
VARIANTS = {
    "bf16": "precision=bf16",
    "fp8": "precision=fp8",
    "blocks": "precision=fp8 precision.gradient_blocks=true",
    "fp32": "precision=fp32",
    "split": "precision=bf16",
    "nudged": "precision=bf16 optim.lr=2.2000022e-4",
}
COLORS = {
    "bf16": "black",
    "fp8": "tab:red",
    "blocks": "tab:blue",
    "fp32": "tab:green",
    "split": "tab:gray",
    "nudged": "tab:olive",
}
SEEDS = ("0", "1", "2", "3", "4", "5")
BF16_RUNS = ("bf16", "split", "nudged")  # which differ by rounding alone: any of them is as good a yardstick


@dataclass(frozen=True)
class Losses:
    """Training losses of all steps, and validation losses by step."""

    train: list[float]
    val: dict[int, float]

    @staticmethod
    def read(model: str, variant: str, seed: str) -> Losses | None:
        """None if that run is not there or not finished."""
        path = RUNS / f"{model}-{variant}-{seed}" / "metrics.jsonl"
        if not path.exists():
            return None
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        train = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
        val = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
        return Losses([train[s] for s in sorted(train)], val) if len(train) == steps_of(model) else None

    def smoothed(self, end: int) -> float:
        """The mean over the last WINDOW steps up to this one."""
        return sum(self.train[end - WINDOW : end]) / WINDOW


def steps_of(model: str) -> int:
    return {"same": 1, "long": LONG, "longer": LONGER}.get(model.partition("_")[2], STEPS)


def run(model: str, variant: str, seed: str = "0") -> None:
    name = f"{model}-{variant}-{seed}"
    rows, cuts = ROWS[model.split("_")[0]] * (4 if model.endswith("_batch") else 1), 2 if variant == "split" else 1
    words = f"{COMMON} schedule.micro_batches={cuts} data.micro_batch_size={rows // cuts} seed={seed} "
    words += f"{MODELS[model].format(seed=seed)} {VARIANTS[variant]} steps={steps_of(model)} runs_dir={RUNS} run={name}"
    subprocess.run([sys.executable, "train.py", *words.split()], check=True)


def report(*models: str) -> None:
    """Table and picture of these models' finished runs, of all by default. What is published of other runs stays."""
    chosen = models or tuple(MODELS)
    rows: list[Row] = []
    for model in chosen:
        for variant in VARIANTS:
            differences = []
            for seed in SEEDS:
                ours, bf16 = Losses.read(model, variant, seed), Losses.read(model, "bf16", seed)
                if variant == "bf16" or ours is None or bf16 is None:
                    continue
                case = f"{model}, {variant}, seed {seed}"
                if model.endswith("_same"):
                    rows.append(Row(f"{case}, same weights", "validation loss", ours.val[1], "bf16", bf16.val[1]))
                    continue
                steps = steps_of(model)
                differences.append(100 * (ours.smoothed(steps) / bf16.smoothed(steps) - 1))
                for end in (2 * steps // 5, 3 * steps // 5, 4 * steps // 5, steps):
                    name = f"{case}, steps {end - WINDOW + 1}-{end}"
                    rows.append(Row(name, "loss", ours.smoothed(end), "bf16", bf16.smoothed(end)))
                rows.append(Row(f"{case}, step {steps}", "validation loss", ours.val[steps], "bf16", bf16.val[steps]))
            if len(differences) > 1:
                case = f"{model}, {variant} against bf16, mean of {len(differences)} seeds, last {WINDOW} steps"
                error = statistics.stdev(differences) / len(differences) ** 0.5
                rows.append(Row(case, "% more loss", statistics.mean(differences), "standard error", error))
        rows += against_all(model)
    publish("fp8_training", rows, keep=True)
    draw(chosen, Path(f"docs/images/fp8_training{models[0][models[0].find('_') :] if models else ''}.png"))


def behind() -> None:
    """Prints, from the published rows, how many percent more steps each variant needs."""
    found: dict[str, dict[str, dict[int, tuple[float, float]]]] = {}
    for row in json.loads((RESULTS / "fp8_training.json").read_text())["rows"]:
        if at := re.fullmatch(r"(\w+, \w+), seed (\d), steps \d+-(\d+)", row["case"]):
            found.setdefault(at[1], {}).setdefault(at[2], {})[int(at[3])] = row["ours"], row["theirs"]
    print(f"{'':22} {'% more loss':>24} {'slope':>8} {'% more steps':>24}")
    for case, seeds in found.items():
        losses, slopes, steps = zip(*map(_steps_behind, seeds.values()), strict=True)
        slope = f"{statistics.mean(slopes):8.3f}"
        print(f"{case:22} {_mean_and_error(losses):>24} {slope} {_mean_and_error(steps):>24}")


def _steps_behind(windows: Mapping[int, tuple[float, float]]) -> tuple[float, float, float]:
    """% more loss at the end, d ln(BF16's loss) / d ln(step) from the first window to the last, % more steps.

    windows   last step of a window → the variant's loss and BF16's; a window counts at its middle
    """
    (first, (_, before)), (last, (ours, bf16)) = min(windows.items()), max(windows.items())
    slope = math.log(bf16 / before) / math.log((last - WINDOW / 2) / (first - WINDOW / 2))
    more = math.log(ours / bf16)
    return 100 * math.expm1(more), slope, 100 * math.expm1(more / -slope)


def _mean_and_error(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:+.2f} (one seed)"
    return f"{statistics.mean(values):+.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f} ({len(values)} seeds)"


def against_all(model: str) -> list[Row]:
    """Each variant's loss over the last steps against the mean of the BF16 runs of its seed, where all of them are."""
    rows, steps = [], steps_of(model)
    for variant in VARIANTS:
        differences = []
        for seed in SEEDS:
            ours = Losses.read(model, variant, seed)
            runs = [run for name in BF16_RUNS if (run := Losses.read(model, name, seed)) is not None]
            if ours is not None and len(runs) == len(BF16_RUNS):
                bf16 = statistics.mean(run.smoothed(steps) for run in runs)
                differences.append(100 * (ours.smoothed(steps) / bf16 - 1))
        if len(differences) > 1:
            case = f"{model}, {variant} against all BF16 runs, mean of {len(differences)} seeds, last {WINDOW} steps"
            error = statistics.stdev(differences) / len(differences) ** 0.5
            rows.append(Row(case, "% more loss", statistics.mean(differences), "standard error", error))
    return rows


def draw(chosen: Sequence[str], path: Path) -> None:
    """Losses above, differences from BF16 below; one column for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = [m for m in chosen if not m.endswith("_same") and any(Losses.read(m, "bf16", s) for s in SEEDS)]
    figure, axes = plt.subplots(2, len(models), figsize=(5 * len(models), 5.5), sharex="col", squeeze=False)
    for column, model in enumerate(models):
        above, below = axes[:, column]
        ends = range(WINDOW, steps_of(model) + 1, 10)
        for (variant, color), seed in product(COLORS.items(), SEEDS):
            ours, bf16 = Losses.read(model, variant, seed), Losses.read(model, "bf16", seed)
            if ours is None or bf16 is None:
                continue
            label = None if variant in above.get_legend_handles_labels()[1] else variant
            above.plot(ends, [ours.smoothed(e) for e in ends], color=color, label=label, linewidth=1)
            if variant != "bf16":
                percent = [100 * (ours.smoothed(e) / bf16.smoothed(e) - 1) for e in ends]
                below.plot(ends, percent, color=color, linewidth=1)
        below.axhspan(-0.25, 0.25, color="0.9")
        above.set_title(f"{model}: training loss, mean of {WINDOW} steps")
        below.set_title("difference from BF16 in % (grey: the report's 0.25)")
        below.set_xlabel("step")
        above.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    match sys.argv[1:]:
        case ["run", model, variant, *seed] if model in MODELS and variant in VARIANTS and len(seed) <= 1:
            run(model, variant, *seed)
        case ["report", *models] if set(models) <= set(MODELS):
            report(*models)
        case ["behind"]:
            behind()
        case _:
            models, variants = "|".join(MODELS), "|".join(VARIANTS)
            ways = f"run {models} {variants} [SEED] | report [MODEL ...] | behind"
            sys.exit(f"usage: python -m benchmarks.fp8_training {ways}")


if __name__ == "__main__":
    main()
