"""What a searched schedule gains over DualPipe, in the simulator, over a grid of models, sizes and memory.

    .venv/bin/python -m benchmarks.search [--ranks 8 16] [--effort 1000000]

The model is DeepSeek-V3's row of 61 layers, three of them dense, in units of a MoE layer's forward. A MoE layer takes
F 1, I 1.3, W 0.7, and three quarters of that in a pair, which hides communication; a dense layer has none to hide and
takes 0.6 each. Embedding F 0.02, W 0.02; head F, I and W 0.8; multi-token prediction one more MoE layer and head.
These are assumptions, not measurements: what matters is how uneven they make the stages. `balanced` cuts the model
by them. 2.5 micro-batches per rank; a message takes 0.2.

Everyone has R devices. Memory is per rank in R-ths of the model × micro-batches; DualPipe needs R + 1. `best known` is
the fastest named schedule that fits. Simulated times, so the machine does not matter; the search itself is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.report import Row, publish
from dualpipe.auto import EFFORT, judge, known_schedules, search
from dualpipe.costs import Costs
from dualpipe.schedules import make_schedule
from dualpipe.split import ModelWork, Work

DENSE, MOE = Work(0.6, 0.6, 0.6), Work(1.0, 1.3, 0.7, 0.75)
EMBEDDING, HEAD = Work(0.02, 0.0, 0.02), Work(0.8, 0.8, 0.8)
MODELS = {
    "even": ModelWork((MOE,) * 64),
    "embedding, head": ModelWork((MOE,) * 61, EMBEDDING, HEAD),
    "embedding, head, MTP": ModelWork((MOE,) * 61, EMBEDDING, HEAD + MOE + HEAD),
    "the same, 3 dense layers": ModelWork((DENSE,) * 3 + (MOE,) * 58, EMBEDDING, HEAD + MOE + HEAD),
    "the same, balanced": ModelWork((DENSE,) * 3 + (MOE,) * 58, EMBEDDING, HEAD + MOE + HEAD),
}
MESSAGE = 0.2  # of a MoE layer's forward, to send an activation on


@dataclass(frozen=True)
class Case:
    model: str
    ranks: int
    overlap: bool
    activations: float

    @property
    def micro_batches(self) -> int:
        return 5 * self.ranks // 2

    @property
    def cuts(self) -> tuple[Costs, Costs]:
        """In R and in 2·R stages."""
        work = replace(MODELS[self.model], latency=MESSAGE)
        cuts = []
        for stages in (self.ranks, 2 * self.ranks):
            count = len(work.layers)
            equal = tuple((s + 1) * count // stages - s * count // stages for s in range(stages))
            sizes = work.balanced(stages, mirrored=True) if "balanced" in self.model else equal
            costs = work.stages(sizes)
            cuts.append(costs if self.overlap else replace(costs, overlap=1.0))
        return cuts[0], cuts[1]

    def __str__(self) -> str:
        pairs = "pairs hide" if self.overlap else "no overlap"
        return f"{self.model}, PP {self.ranks}, {pairs}, memory {self.activations:g}"


def grid(ranks: list[int]) -> Iterator[Case]:
    """All models with pairs that hide communication, the most uneven one without."""
    for size in ranks:
        for model in MODELS:
            for activations in (0.75 * size, size + 1, 1.5 * size + 1):
                yield Case(model, size, True, activations)
        for activations in (0.75 * size, size + 1):
            yield Case("even", size, False, activations)
            yield Case("the same, 3 dense layers", size, False, activations)


def solve(case: Case, effort: int) -> list[Row]:
    started = time.perf_counter()
    found = search(case.ranks, case.micro_batches, case.cuts, case.activations, effort=effort)
    seconds = time.perf_counter() - started
    dualpipe = judge(make_schedule("dualpipe", case.ranks, case.micro_batches), case.cuts[0])
    known = [f for cut in case.cuts for f in known_schedules(case.ranks, case.micro_batches, cut)]
    fitting = sorted((f for f in known if f.activations <= case.activations), key=lambda f: f.order)
    kind = {1: "straight", 2: "V"}[found.schedule.num_stages // case.ranks]
    kind = "bidirectional" if found.schedule.num_directions == 2 else kind
    print(f"{case}: {kind}, {found.activations:g} activations, searched {seconds:.1f} s", flush=True)
    rows = [Row(str(case), "makespan", found.makespan, "DualPipe, memory R + 1", dualpipe.makespan)]
    if fitting:
        best = fitting[0]
        rows.append(Row(str(case), "makespan", found.makespan, f"best known: {best.schedule.name}", best.makespan))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--effort", type=int, default=EFFORT)
    options = parser.parse_args()
    publish("search", [row for case in grid(options.ranks) for row in solve(case, options.effort)])


if __name__ == "__main__":
    main()
