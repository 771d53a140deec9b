"""Serving with experts on two ranks behind a slow link: two micro-batches in turns against one.

    sudo .venv/bin/python -m benchmarks.serving_overlap [--model small] [--ratios 0.5,1]

Needs root: each rank is in a network namespace of its own, behind a link limited by `tc … tbf` (`slow_network.py`).
EP 2, one thread per rank, real compute, FP32. A step of prefill reads 16 prompts of 128 tokens on each rank, a step of
decode makes one token of each of 64 sequences.

    compute          time of a step in one micro-batch on an unlimited link, the shorter of before and after
    communication    bytes that left a rank in a step ÷ the rate of the link, set for about `ratios` times compute
    ideal            max(compute, communication)
    hidden           (off − on) / (off − ideal): what overlap saved of what it could save
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.overlap_worker import link_bytes
from benchmarks.report import Row, publish
from benchmarks.slow_network import SlowNetwork
from model.__main__ import load_preset
from model.names import named_tensors
from model.sampling import Sampling
from parallel.whole import empty_model
from serving.engine import CacheSize, Engine
from serving.expert_groups import serving_groups
from serving.expert_parallel import ExpertParallel
from serving.expert_plan import ExpertSettings
from serving.expert_weights import stage_source
from serving.scheduler import Limits
from serving.sequence import Request

ROOT = Path(__file__).parent.parent
PROMPTS, PROMPT, SEQUENCES, SHORT = 16, 128, 64, 16
STEPS = {"prefill": 3, "decode": 16}  # of a round
ROUNDS = 2
TOKENS = {"prefill": PROMPTS * PROMPT, "decode": SEQUENCES}  # of a rank and step


class Worker:
    """One rank: an engine whose steps are timed, in one micro-batch and in two."""

    def __init__(self, name: str) -> None:
        config = load_preset(name, {"init_std": 0.1})
        model = empty_model(config, "fp32")
        stage = empty_model(config, "fp32", with_experts=False)
        held = {name: tensor for name, tensor, _ in named_tensors(model)}
        with torch.no_grad():
            for name, tensor, _ in named_tensors(stage):
                tensor.copy_(held[name])
        groups = serving_groups(range(dist.get_world_size()))
        self.experts = ExpertParallel(stage, stage_source(model), groups, ExpertSettings())
        self.count = 0

    def engine(self, sequences: int, length: int, budget: int) -> Engine:
        pages = sequences * -(-length // 16)
        return Engine(self.experts.stage, length, CacheSize(pages, 16), Limits(sequences, budget), False, self.experts)

    def add(self, engine: Engine, sequences: int, length: int, new: int) -> None:
        """Prompts of random bytes, others on every rank."""
        for _ in range(sequences):
            self.count += 1
            generator = torch.Generator().manual_seed(2 * self.count + dist.get_rank())
            prompt = tuple(torch.randint(0, 256, (length,), generator=generator).tolist())
            engine.add(Request(str(self.count), prompt, new, Sampling(temperature=0)))

    def prefill(self) -> Callable[[], float]:
        engine = self.engine(PROMPTS, PROMPT + 1, PROMPTS * PROMPT)

        def step() -> float:
            self.add(engine, PROMPTS, PROMPT, 1)
            return timed(engine)

        return step

    def decode(self) -> Callable[[], float]:
        steps = 2 + 2 * (ROUNDS + 1) * STEPS["decode"]
        engine = self.engine(SEQUENCES, SHORT + steps, SEQUENCES * SHORT)
        self.add(engine, SEQUENCES, SHORT, steps)
        engine.step()
        return lambda: timed(engine)

    @torch.inference_mode()
    def run(self, kinds: Sequence[str]) -> dict[str, Any]:
        """Seconds per step of each kind, off and on, round by round, and the bytes that a step sends."""
        found: dict[str, Any] = {}
        for kind in kinds:
            make = self.prefill if kind == "prefill" else self.decode
            step = make()
            times: dict[str, list[float]] = {"off": [], "on": []}
            for at in range(ROUNDS + 1):
                for name, least in (("off", 0), ("on", 1)):
                    self.experts.settings = replace(self.experts.settings, overlap_rows=least)
                    before = link_bytes()
                    seconds = [step() for _ in range(STEPS[kind])]
                    if at:  # the first round is a warm-up
                        times[name].append(statistics.mean(seconds))
                        found[f"{kind} {name} bytes"] = (link_bytes() - before) / STEPS[kind]
            found |= {f"{kind} {name}": values for name, values in times.items()}
        return found


def timed(engine: Engine) -> float:
    """Seconds of one step; all ranks begin it together, as each begins with an exchange."""
    started = time.perf_counter()
    engine.step()
    return time.perf_counter() - started


def work(model: str, kinds: Sequence[str]) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.FileStore(os.environ["STORE"], world), rank=rank, world_size=world)
    print(json.dumps(Worker(model).run(kinds)))
    dist.destroy_process_group()


def measured(network: SlowNetwork, model: str, kinds: Sequence[str]) -> dict[str, float]:
    """Medians over rounds and ranks."""
    command = [sys.executable, "-m", "benchmarks.serving_overlap", "--model", model, "--worker", *kinds]
    results = [json.loads(text.splitlines()[-1]) for text in network.run(command, timeout=300, cwd=ROOT)]
    flat = {key: [v for r in results for v in (r[key] if isinstance(r[key], list) else [r[key]])] for key in results[0]}
    return {key: statistics.median(values) for key, values in flat.items()}


def rows_of(kind: str, megabits: float, free: dict[str, float], slow: dict[str, float]) -> list[Row]:
    compute, off, on = free[f"{kind} off"], slow[f"{kind} off"], slow[f"{kind} on"]
    communication = slow[f"{kind} on bytes"] * 8 / (megabits * 1e6)
    ideal, tokens = max(compute, communication), 2 * TOKENS[kind]
    case = f"{kind}, ratio {communication / compute:.2f} (link {megabits:.0f} Mbit/s)"
    return [
        Row(case, "tokens/s, overlap on", tokens / on, "overlap off", tokens / off),
        Row(case, "s per step, overlap on", on, "max(compute, communication)", ideal),
        Row(case, "s, communication", communication, "compute", compute),
        Row(case, "s saved by overlap (ratio: hidden)", off - on, "could be saved", off - ideal),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--ratios", default="0.5,1")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.model, options.worker)
        return
    rows, slow = [], []
    with SlowNetwork(2, 0) as network:
        before = measured(network, options.model, list(TOKENS))
        for ratio in (float(word) for word in options.ratios.split(",")):
            for kind in TOKENS:
                network.set_rate(before[f"{kind} off bytes"] * 8 / 1e6 / (before[f"{kind} off"] * ratio))
                slow.append((kind, network.megabits, measured(network, options.model, [kind])))
        network.set_rate(0)
        after = measured(network, options.model, list(TOKENS))
    free = {key: min(value, after[key]) for key, value in before.items()}  # the stricter of two
    for kind in TOKENS:
        on, off = (2 * TOKENS[kind] / free[f"{kind} {name}"] for name in ("on", "off"))
        rows.append(Row(f"{kind}, unlimited link", "tokens/s, overlap on", on, "overlap off", off))
    for kind, megabits, results in slow:
        rows += rows_of(kind, megabits, free, results)
    publish("serving_overlap", rows)


if __name__ == "__main__":
    main()
