"""What a token costs as the sequence grows, and as experts do at constant active parameters: time and peak memory.

    .venv/bin/python -m benchmarks.model_scaling [--rounds 3]

Forward and backward of two layers, the second of them with experts, in FP32; one process, two threads. All points are
measured in every round, and of each the least that it took counts: the best of seven steps in the best round. More
experts cost the router's time per token, and per step what it takes to go through their weights, however few rows each
has. `weights` is the least that this can take: to read them for the forward and for the gradients of the inputs, and to
write their gradients, at the speed at which this machine copies memory, measured here. With more tokens in a step it
is shared by more: `experts, 16,384 tokens`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import resource
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.model import SMALL, THREADS, Case, adamw, random_batch, seconds
from benchmarks.peer import our_model
from benchmarks.report import RESULTS, machine
from model.cpu.allocator import keep_freed_memory
from model.names import named_routers
from model.router import Router
from model.stage import ModelStage
from parallel.build import Replica

BASE = replace(SMALL, num_layers=2, vocab_size=512)
Point = dict[str, float]


def experts(count: int, batch: int) -> Case:
    return Case(str(count), replace(BASE, num_experts=count, expert_ffn_size=64), 512, batch)


CASES = {
    "sequence": [Case(str(s), BASE, s, 4096 // s) for s in (512, 1024, 2048, 4096)],
    "experts": [experts(e, 8) for e in (16, 32, 64, 128, 256)],
    "experts, 16,384 tokens": [experts(e, 32) for e in (16, 64, 256)],
}
COLUMNS = {
    "us_per_token": "µs per token",
    "router_us": "of which routers",
    "weights_us": "weights",
    "plain_us": "with compile=off",
    "optimizer_us": "optimizer",
    "kib_per_token": "peak KiB per token",
}


def scaling(rounds: int) -> None:
    """Measures all points in every round, writes the results, prints tables and draws a picture."""
    found: dict[str, list[Point]] = {}
    for _ in range(rounds):
        for name, cases in CASES.items():
            points = [_point(case) for case in cases]
            found[name] = [_least(*both) for both in zip(found.get(name, points), points, strict=True)]
    file = RESULTS / "model_scaling.json"
    file.write_text(json.dumps({"points": found, "rounds": rounds, "machine": machine()}, indent=1) + "\n")
    for name, points in found.items():
        print(" | ".join((name, *COLUMNS.values())))
        for point in points:
            print(" | ".join((f"{point['size']:.0f}", *(f"{point[column]:.1f}" for column in COLUMNS))))
        _beyond(name, points)
    _draw(found, Path("docs/images/model_scaling.svg"))


def _least(before: Point, now: Point) -> Point:
    return {name: min(before[name], now[name]) for name in now}


def _beyond(name: str, points: list[Point]) -> None:
    """What the most experts cost more than the fewest, and how much of it routers and weights explain."""
    if name.startswith("experts"):
        more, router, weights = (points[-1][c] - points[0][c] for c in ("us_per_token", "router_us", "weights_us"))
        left = more - router - weights
        share = 100 * left / points[0]["us_per_token"]
        print(f"{more:.1f} µs more: routers {router:.1f}, weights {weights:.1f}, left {left:.1f} ({share:.1f} %)")


def _point(case: Case) -> Point:
    """Forward and backward with compile=on, and beside it with compile=off.

    The optimizer stands apart: its time depends on the parameters, not on the tokens.
    """
    plain_us = 1e6 * _seconds_of_a_step(case, compiled=False)[0] / case.tokens
    taken, replica = _seconds_of_a_step(case, compiled=True)
    batch = random_batch(case)
    before = _reset_peak()
    replica.pipeline.step([batch])
    peak = resource_peak() - before
    optimizer = adamw(replica.stages[0].parameters())
    update = min(seconds(lambda: float(optimizer.step() or 0)) for _ in range(5))
    return {
        "size": float(case.name),
        "us_per_token": 1e6 * taken / case.tokens,
        "router_us": 1e6 * _router_seconds(replica.stages[0], case) / case.tokens,
        "weights_us": 1e6 * _weights_seconds(case) / case.tokens,
        "kib_per_token": peak / 1024 / case.tokens,
        "plain_us": plain_us,
        "optimizer_us": 1e6 * update / case.tokens,
    }


def _seconds_of_a_step(case: Case, compiled: bool) -> tuple[float, Replica]:
    """Best of seven, after one to warm up."""
    replica, batch = our_model(case.config, "fp32", compiled=compiled), random_batch(case)
    replica.pipeline.step([batch])
    return min(seconds(lambda: float(replica.pipeline.step([batch])[0].sum())) for _ in range(7)), replica


def _router_seconds(stage: ModelStage, case: Case) -> float:
    """Forward and backward of all routers, alone."""
    x_TD = torch.randn(case.tokens, case.config.hidden_size, requires_grad=True)
    total = 0.0
    for router in named_routers(stage).values():
        total += min(seconds(partial(_route, router, x_TD)) for _ in range(5))
    return total


def _route(router: Router, x_TD: Tensor) -> float:
    gates_TK = router(x_TD).gates_TK
    gates_TK.square().sum().backward()
    return 0.0


def _weights_seconds(case: Case) -> float:
    """To read the routed experts' weights twice and to write their gradients once, as fast as memory is copied."""
    config = case.config
    moved = 3 * 4 * 3 * config.num_moe_layers * config.num_experts * config.hidden_size * config.expert_ffn_size
    source = torch.ones(2**26)  # 256 MiB, more than caches hold
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / min(seconds(lambda: float(target.copy_(source)[0])) for _ in range(5))
    return moved / copied


def _reset_peak() -> int:
    """Give freed memory back, start the kernel's record of the peak anew; returns what is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resource_peak()


def resource_peak() -> int:
    """Peak resident memory in bytes, since the last reset where the kernel has one."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _draw(data: dict[str, list[Point]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(data), figsize=(4.5 * len(data), 3.4), layout="constrained")
    for axis, (name, points) in zip(axes, data.items(), strict=True):
        sizes = [p["size"] for p in points]
        axis.plot(sizes, [p["us_per_token"] for p in points], marker="o", color="#1f4e8c", label="µs per token")
        axis.plot(sizes, [p["kib_per_token"] for p in points], marker="s", color="#c26d2d", label="peak KiB per token")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [f"{s:.0f}" for s in sizes])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("sequence length" if name == "sequence" else f"{name}, active parameters constant")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(THREADS)
    keep_freed_memory()
    scaling(options.rounds)


if __name__ == "__main__":
    main()
