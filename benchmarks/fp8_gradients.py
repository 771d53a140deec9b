"""Are FP8's gradients those of FP32, on average? Both, and BF16's, at the same trained weights on the same text.

    .venv/bin/python -m benchmarks.fp8_training run wider bf16 0     # makes the weights: about 6 minutes
    .venv/bin/python -m benchmarks.fp8_gradients [--batches 24] [--free-routing]

Gradients are summed over all batches, which averages rounding noise away and leaves what is systematic. Per kind of
weight, over all layers: the projection ⟨g, g32⟩ ÷ ⟨g32, g32⟩, which is 1 for a gradient that is neither too long nor
too short on average, and the cosine between the two. "noise" is of single batches and elements: the root mean square
over batches of what an element of the gradient is off, by that of the element itself (the median over elements).

Tokens go to the experts that FP32 chose for them, or a choice that flips would hide what rounding does. With
--free-routing every precision chooses for itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize
from torch import Tensor, nn

from benchmarks.fp8_training import COMMON, MODELS, ROWS, RUNS
from benchmarks.report import Row, publish
from model.grads import grad_of
from model.router import Router
from training.config import from_hydra, register_schemas
from training.stop import StopRequest
from training.trainer import Trainer, join_process_group, prepare

WEIGHTS = "wider-bf16-0"
KINDS = ("embedding", "attention.", "mlp.", "shared.", "experts.", "router.", "norm", "head")


Gradients = list[dict[str, Tensor]]  # by batch, then by parameter


class Routes:
    """Which experts every router has chosen, call by call: written down once, then followed."""

    def __init__(self) -> None:
        self.chosen: dict[str, list[Tensor]] = defaultdict(list)
        self.complete = False

    def attach(self, stage: nn.Module) -> None:
        for name, module in stage.named_modules():
            if isinstance(module, Router):
                choose = self._follow(name) if self.complete else self._note(name, module._choose)
                module._choose = choose  # type: ignore[assignment,method-assign]

    def _note(self, name: str, choose: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def noting(scores_TE: Tensor) -> Tensor:
            self.chosen[name].append(choose(scores_TE))
            return self.chosen[name][-1]

        return noting

    def _follow(self, name: str) -> Callable[[Tensor], Tensor]:
        known = iter(self.chosen[name])
        return lambda scores_TE: next(known)


def gradients(precision: str, batches: int, weights: Path, runs_dir: str, routes: Routes | None) -> Gradients:
    """The gradients of so many steps that change nothing."""
    words = f"{COMMON} schedule.micro_batches=1 data.micro_batch_size={ROWS['wider']} seed=0 {MODELS['wider']}".split()
    words = [word for word in words if not word.startswith(("eval_every", "save_every"))]
    words += [f"precision={precision}", f"steps={batches}", f"init_from={weights}", f"runs_dir={runs_dir}", "run=one"]
    with initialize(version_base="1.3", config_path="../conf"):
        job = prepare(from_hydra(compose(config_name="config", overrides=words)), 1)
    trainer = Trainer(job, join_process_group(job), StopRequest())
    stages = list(trainer.replica.stages.values())
    if routes is not None:
        for stage in stages:
            routes.attach(stage)
    found: Gradients = []

    def keep(rate: float, scale: float = 1.0) -> None:
        found.append({name: grad_of(p).clone() for stage in stages for name, p in stage.named_parameters()})

    trainer.update.step = keep  # type: ignore[method-assign]
    for _ in range(batches):
        trainer._train_one_step()
    trainer.close()
    if routes is not None:
        routes.complete = True
    return found


def kind_of(name: str) -> str:
    if "norm" in name:
        return "norm"
    return next(kind for kind in KINDS if kind in name)


def compare(ours: Gradients, exact: Gradients, precision: str) -> list[Row]:
    """Three rows for each kind of weight, and three for all together."""
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    noises: dict[str, list[Tensor]] = defaultdict(list)
    for name in exact[0]:
        own_B, other_B = (torch.stack([batch[name].flatten() for batch in grads]) for grads in (ours, exact))
        a, b = own_B.double().sum(0), other_B.double().sum(0)
        products = torch.stack((a @ b, a @ a, b @ b))
        noise = (own_B - other_B).norm(dim=0) / other_B.norm(dim=0)
        for kind in (kind_of(name), "all"):
            sums[kind] += products
            noises[kind].append(noise[noise.isfinite()])  # bytes that no batch holds have no gradient
    rows = []
    for kind in (*KINDS, "all"):
        cross, own, other = sums[kind].tolist()
        case, noise = f"{precision}, {kind.rstrip('.')}", torch.cat(noises[kind]).median().item()
        rows.append(Row(case, "projection on FP32's gradient", cross / other, "no bias", 1.0))
        rows.append(Row(case, "cosine with FP32's gradient", cross / (own * other) ** 0.5, "the same", 1.0))
        rows.append(Row(case, "noise of an element, % of it", 100 * noise, "last bit of BF16", 100 * 2.0**-8))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--free-routing", action="store_true")
    options = parser.parse_args()
    weights = RUNS / WEIGHTS
    if not weights.exists():
        sys.exit(f"{weights} is not there; make it with: python -m benchmarks.fp8_training run wider bf16 0")
    register_schemas()
    routes = None if options.free_routing else Routes()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        exact = gradients("fp32", options.batches, weights, folder, routes)
        for precision in ("bf16", "fp8"):
            rows += compare(gradients(precision, options.batches, weights, folder, routes), exact, precision)
    publish("fp8_gradients_free" if options.free_routing else "fp8_gradients", rows)


if __name__ == "__main__":
    main()
