"""How much of the expert-parallel communication does an overlapped pair hide? PP 2 × EP 2 over a slow network.

    sudo .venv/bin/python -m benchmarks.overlap [--only exchange,pair,peer,step,bytes]

Needs root: every rank lives in a network namespace of its own behind a link limited by `tc … tbf`
(`slow_network.py`). Five parts:

    exchange  one all-to-all between two ranks, gloo's own and ours
    pair    time of an F&B pair without overlap, with it, and the ideal max(compute, communication), where compute is
            the overlapped pair on an unlimited link and communication the pair with no compute; the link is as fast
            as makes communication : compute 0.5, 1 and 2. Compute is EMULATED by sleeps (`emulated.py`), the tokens
            are real. hidden = (off − on) / (off − ideal): what overlap saved of what it could save.
    peer    a whole step of the same emulated stages under DualPipeV: ours against torch's ScheduleDualPipeV, which
            runs the parts of an overlapped action one after the other
    step    a whole training step with REAL compute, overlap off and on, at ratio 1: the link is as fast as makes all
            bytes of a step take the time of the step on an unlimited link
    bytes   hierarchical against all_to_all on 2 nodes × 2 ranks: bytes that crossed between nodes, and time
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.emulated import Shape
from benchmarks.overlap_worker import PAYLOAD
from benchmarks.report import Row, publish
from benchmarks.slow_network import NetworkError, SlowNetwork

ROOT = Path(__file__).parent.parent
RATIOS = (0.5, 1.0, 2.0)
STEP_MICRO_BATCHES = (12, 20)
SHAPE = Shape()
ROW_BYTES = SHAPE.hidden * 4 + SHAPE.chosen * 8  # a token with its gates and experts
PAIR_BYTES = SHAPE.tokens * (4 * SHAPE.layers * ROW_BYTES + 2 * SHAPE.hidden * 4)  # 4 all-to-alls a layer, 2 messages


def run(network: SlowNetwork, job: str, ranks_per_node: int = 1, **arguments: Any) -> list[dict[str, Any]]:
    """One job on all ranks; what each measured."""
    command = [sys.executable, "-m", "benchmarks.overlap_worker", job, json.dumps(arguments)]
    return [json.loads(text.splitlines()[-1]) for text in network.run(command, ranks_per_node, 300, ROOT)]


def median(results: list[dict[str, Any]], key: str) -> float:
    """Over all ranks, and over the values of each if there are several."""
    values = (r[key] for r in results)
    return statistics.median(v for value in values for v in (value if isinstance(value, list) else [value]))


def measure_pair() -> list[Row]:
    def measure(network: SlowNetwork) -> list[dict[str, Any]]:
        return run(network, "pair", unit=SHAPE.unit, micro_batches=8, repeats=1)

    rows, slow = [], []
    with SlowNetwork(4, 0) as network:
        before = median(measure(network), "on")
        for ratio in RATIOS:
            network.set_rate(PAIR_BYTES * 8 / 1e6 / (before * ratio))
            slow.append((ratio, network.megabits, measure(network)))
        network.set_rate(0)
        compute = min(before, median(measure(network), "on"))  # the stricter of two
        for ratio, megabits, results in slow:
            off, on, communication = (median(results, key) for key in ("off", "on", "communication"))
            ideal = max(compute, communication)
            case = f"pair, ratio {ratio:g} (link {megabits:.0f} Mbit/s)"
            rows.append(Row(case, "s, overlap on against ideal", on, "max(compute, communication)", ideal))
            rows.append(Row(case, "s, overlap on against off", on, "overlap off", off))
            rows.append(Row(case, "s, communication against compute", communication, "compute", compute))
            rows.append(Row(case, "s saved by overlap (ratio: hidden)", off - on, "could be saved", off - ideal))
    return rows


def measure_peer() -> list[Row]:
    with SlowNetwork(4, 800) as network:
        results = run(network, "peer", unit=SHAPE.unit, micro_batches=12, repeats=1)
    off, on, torch = (median(results, key) for key in ("off", "on", "torch"))
    case = "step under DualPipeV, emulated compute (link 800 Mbit/s)"
    return [
        Row(case, "s, overlap on", on, "torch ScheduleDualPipeV", torch),
        Row(case, "s, overlap off", off, "torch ScheduleDualPipeV", torch),
    ]


def measure_step() -> list[Row]:
    """With few and with more micro-batches: the first and last chunks of a step have no partner to hide behind."""
    rows = []
    for count in STEP_MICRO_BATCHES:
        with SlowNetwork(4, 0) as network:
            free = run(network, "step", micro_batches=count, repeats=2)
            network.set_rate(median(free, "off bytes") * 8 / 1e6 / median(free, "off"))
            slow = run(network, "step", micro_batches=count, repeats=2)
            case = f"training step of {count} micro-batches, real compute, ratio 1 (link {network.megabits:.0f} Mbit/s)"
        rows.append(Row(case, "s, overlap on", median(slow, "on"), "overlap off", median(slow, "off")))
        rows.append(Row(case, "s, overlap on", median(slow, "on"), "overlap off, unlimited link", median(free, "off")))
    return rows


def measure_bytes() -> list[Row]:
    with SlowNetwork(2, 400) as network:
        results = run(network, "bytes", ranks_per_node=2, nodes=2, repeats=5)
    case = "2 nodes × 2 ranks, 4 of 16 experts on 1 node"
    return [
        Row(case, "MB between nodes, hierarchical", median(results, "hierarchical bytes") / 1e6, "all_to_all",
            median(results, "all_to_all bytes") / 1e6),
        Row(case, "remote copies per token: nodes", median(results, "remote nodes per token"), "ranks",
            median(results, "remote ranks per token")),
        Row(case, "s, hierarchical", median(results, "hierarchical"), "all_to_all", median(results, "all_to_all")),
    ]  # fmt: skip


def measure_exchange() -> list[Row]:
    with SlowNetwork(2, 400) as network:
        results = run(network, "exchange", repeats=15)
    case = "2 MB each way between two ranks (link 400 Mbit/s)"
    wire = PAYLOAD * 8 / (network.megabits * 1e6)
    return [
        Row(case, "s, receives first", median(results, "ours"), "bytes / bandwidth", wire),
        Row(case, "s, gloo's all-to-all", median(results, "gloo"), "bytes / bandwidth", wire),
        Row(case, "s, 16 numbers beside it, group of their own", median(results, "small, own group"),
            "same group", median(results, "small, same group")),
    ]  # fmt: skip


PARTS = {
    "exchange": measure_exchange,
    "pair": measure_pair,
    "peer": measure_peer,
    "step": measure_step,
    "bytes": measure_bytes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, separated by commas")
    chosen = parser.parse_args().only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--only {', '.join(sorted(unknown))}: choose of {', '.join(PARTS)}")
    try:
        for part in chosen:
            publish(f"overlap_{part}", PARTS[part]())
    except NetworkError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
