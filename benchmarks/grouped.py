"""Products with all experts on a CPU: our loop against torch's grouped GEMM, forward, input and weight gradients.

    .venv/bin/python -m benchmarks.grouped [--rounds 7]

8,192 rows, a new draw of uneven loads (Zipf 0.5) in every round, because in training shapes do not repeat and oneDNN
generates code for each new one. One thread, and its processor time instead of the clock's, so that other work on the
machine changes little. Ours and torch's in turns; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.report import Row, publish
from model.products import add_grouped_weight_grads, add_weight_grads_by_kernel, grouped_kernel, grouped_product

ROWS = 8192
SHAPES = ((32, 512, 512), (64, 512, 512), (256, 512, 128))  # experts, outputs, inputs
Product = Callable[[Tensor, Tensor, list[int]], Tensor]
WeightGrad = Callable[[Tensor, Tensor, Tensor, list[int]], None]


def loads(experts: int, generator: torch.Generator) -> list[int]:
    """How many of the rows each expert gets."""
    share = (1.0 / torch.arange(1, experts + 1).sqrt())[torch.randperm(experts, generator=generator)]
    drawn = torch.multinomial(share, ROWS, replacement=True, generator=generator)
    return torch.bincount(drawn, minlength=experts).tolist()


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(experts: int, outputs: int, inputs: int, dtype: torch.dtype, rounds: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(ROWS, size, generator=generator).to(dtype) for size in (inputs, outputs))
    weight = torch.randn(experts, outputs, inputs, generator=generator).to(dtype)
    grad = torch.zeros(experts, outputs, inputs)
    ways: dict[str, tuple[Product, WeightGrad]] = {
        "loop": (grouped_product, add_grouped_weight_grads),
        "grouped_mm": (grouped_kernel, add_weight_grads_by_kernel),
    }
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds + 2):
        counts = loads(experts, generator)
        for way, (multiply, add_grads) in ways.items():
            for name, work in (
                ("forward", partial(multiply, x, weight, counts)),
                ("input grad", partial(multiply, dy, weight.transpose(1, 2), counts)),
                ("weight grad", partial(add_grads, grad, dy, x, counts)),
            ):
                times.setdefault((name, way), []).append(seconds(work))
    case = f"{experts} × {outputs} × {inputs}, {str(dtype).removeprefix('torch.')}"
    rows = []
    for name in ("forward", "input grad", "weight grad"):
        gflops = {w: 2e-9 * ROWS * outputs * inputs / statistics.median(times[name, w][2:]) for w in ways}
        rows.append(Row(f"{case}, {name}", "GFLOP/s", gflops["loop"], "torch grouped_mm", gflops["grouped_mm"]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    dtypes = (torch.float32, torch.bfloat16)
    publish("grouped", [row for shape in SHAPES for dtype in dtypes for row in compare(*shape, dtype, rounds)])


if __name__ == "__main__":
    main()
