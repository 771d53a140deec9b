"""Expert placement against deepseek-ai/EPLB: maximum over mean load per rank, and moves between plans.

    .venv/bin/python -m benchmarks.placement [--eplb PATH] [--layers 20]
    .venv/bin/python -m benchmarks.placement --record runs/NAME       # loads of a run of ours with 256 experts

256 experts in 288 slots, on 32 ranks (4 nodes, 8 groups: the hierarchical policy) and on 144 ranks (18 nodes: the
global one). Loads: uniformly random, Zipf with exponents 0.5 and 1, and recorded in training without balancing
(benchmarks/data/expert_loads.json). The peer is read from a git repository of EPLB, wherever that is; without one
the script says so and prints our figures beside the perfect 1.

The second table takes a plan to the one for drifted loads: moves as the plans come, and after `closest_plan`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from benchmarks.report import Row, publish
from parallel.placement import place_experts
from parallel.relocation import closest_plan, moves

EXPERTS, SLOTS, GROUPS = 256, 288, 8
MACHINES = {"32 ranks": (32, 4), "144 ranks": (144, 18)}
RECORDED = Path(__file__).parent / "data" / "expert_loads.json"
MIRROR = Path("/work/.mirror/deepseek-ai+EPLB/repo")


def zipf(exponent: float) -> Callable[[np.random.Generator], np.ndarray]:
    ranked = np.round(1e6 / np.arange(1, EXPERTS + 1) ** exponent)
    return lambda generator: generator.permutation(ranked)


def make_loads(layers: int) -> dict[str, list[np.ndarray]]:
    """By kind, the loads of some layers."""
    generator = np.random.default_rng(0)
    kinds: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
        "random": lambda g: g.integers(1, 1000, EXPERTS),
        "Zipf 0.5": zipf(0.5),
        "Zipf 1": zipf(1.0),
    }
    made = {kind: [draw(generator).astype(float) for _ in range(layers)] for kind, draw in kinds.items()}
    return {**made, "recorded": [np.array(row, dtype=float) for row in json.loads(RECORDED.read_text())]}


def load_eplb(repository: Path) -> ModuleType | None:
    if not repository.exists():
        return None
    source = subprocess.run(
        ["git", "-C", str(repository), "show", "HEAD:eplb.py"], check=True, capture_output=True, text=True
    ).stdout
    module = ModuleType("eplb")
    exec(compile(source, "eplb.py", "exec"), module.__dict__)
    return module


def their_imbalance(eplb: ModuleType, loads: np.ndarray, ranks: int, nodes: int) -> float:
    weight = torch.tensor(loads)
    slots, _, copies = eplb.rebalance_experts(weight.unsqueeze(0), SLOTS, GROUPS, nodes, ranks)
    per_rank = (weight / copies[0])[slots[0]].view(ranks, -1).sum(1)
    return float(per_rank.max() / per_rank.mean())


def compare(loads: dict[str, list[np.ndarray]], eplb: ModuleType | None) -> list[Row]:
    """Mean over layers of the imbalance, and the layer where we compare worst."""
    rows = []
    for kind, layers in loads.items():
        for machine, (ranks, nodes) in MACHINES.items():
            ours = [place_experts(w, SLOTS, ranks, nodes, GROUPS).imbalance(w) for w in layers]
            theirs = [1.0 if eplb is None else their_imbalance(eplb, w, ranks, nodes) for w in layers]
            peer = "perfect" if eplb is None else "EPLB"
            rows.append(Row(f"{kind}, {machine}", "max/mean", statistics.mean(ours), peer, statistics.mean(theirs)))
            worst = max(zip(ours, theirs, strict=True), key=lambda pair: pair[0] / pair[1])
            rows.append(Row(f"{kind}, {machine}, worst of {len(layers)}", "max/mean", worst[0], peer, worst[1]))
    return rows


def compare_moves(loads: list[np.ndarray], slack: float) -> list[Row]:
    """Moves when loads drift by 10 %: to the new plan as it comes, and to the closest one of the same balance."""
    generator = np.random.default_rng(1)
    rows = []
    for machine, (ranks, nodes) in MACHINES.items():
        nodes = nodes if GROUPS % nodes == 0 else 1
        few, plain = [], []
        for weights in loads:
            drifted = weights * generator.lognormal(0, 0.1, len(weights))
            before = place_experts(weights, SLOTS, ranks, nodes, GROUPS)
            after = place_experts(drifted, SLOTS, ranks, nodes, GROUPS)
            few.append(len(moves(before, closest_plan(before, after, drifted, nodes, slack))))
            plain.append(len(moves(before, after)))
        label = f"moves of {SLOTS} slots, {machine}, slack {slack:.0%}"
        rows.append(Row(label, "experts", statistics.mean(few), "plan as it comes", statistics.mean(plain)))
    return rows


def record(run: Path) -> None:
    """Keep the expert loads of a run, all layers and windows after the first, as the recorded loads."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    windows = [row["balance/load"] for row in rows if "balance/load" in row][1:]
    layers = [loads for window in windows for loads in window.values()]
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text("[\n" + ",\n".join(json.dumps(loads) for loads in layers) + "\n]\n")
    print(f"{len(layers)} rows of {len(layers[0])} experts in {RECORDED}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eplb", type=Path, default=MIRROR, help="a git repository of deepseek-ai/EPLB")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--record", type=Path, help="only take the loads of this run's folder")
    options = parser.parse_args()
    if options.record is not None:
        record(options.record)
        return
    eplb = load_eplb(options.eplb)
    if eplb is None:
        print(f"no EPLB at {options.eplb}: nothing to compare with but the perfect 1")
    loads = make_loads(options.layers)
    start = time.perf_counter()
    rows = compare(loads, eplb)
    rows += compare_moves(loads["random"], 0.0) + compare_moves(loads["random"], 0.02)
    publish("placement", rows)
    print(f"\n{time.perf_counter() - start:.1f} s in all")


if __name__ == "__main__":
    main()
