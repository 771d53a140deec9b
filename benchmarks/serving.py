"""Prefill and decode of our engine against transformers' `generate` on the same, exported weights.

    .venv/bin/python -m benchmarks.serving [--model small] [--batches 1,16]

All greedy, FP32, on two threads, in one process that keeps freed memory, one after the other in every round; the median
of the rounds counts. Ours is measured without and with its C++ kernels (compile=on). The peer generates with its own
cache (DynamicCache), and with the fastest of its ways to compute experts, tried first. Prefill is the time to one token
each, decode that of the tokens after it. Every token of all is compared. Decode is also set beside the machine: a step
reads each weight that its tokens use once, and the latents of all earlier tokens; their bytes over the bandwidth of
reading memory, measured here too, is the least time of a step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peer import weights_of
from benchmarks.report import Row, publish
from model.__main__ import load_preset
from model.cpu.kernels import suits
from model.hf_files import write_checkpoint
from model.sampling import Sampling
from model.stage import ModelStage
from parallel.whole import empty_model, load_whole_model
from serving.engine import CacheSize, Engine
from serving.load import use_cpu
from serving.scheduler import Limits
from serving.sequence import Request

EXPERTS = ("eager", "grouped_mm")  # its batched_mm copies the weights for every row: 37 times slower in prefill
GREEDY = Sampling(temperature=0)
Prompts = list[list[int]]


def ours(model: ModelStage, prompts: Prompts, count: int) -> Prompts:
    """New tokens of each prompt, all in one batch."""
    length = len(prompts[0]) + count
    cache, limits = CacheSize(len(prompts) * -(-length // 16), 16), Limits(len(prompts), len(prompts) * len(prompts[0]))
    engine = Engine(model, length, cache, limits)
    made: Prompts = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), count, GREEDY))
    with torch.inference_mode():
        while not engine.idle:
            for event in engine.step():
                made[int(event.id)] += event.tokens
    return made


def theirs(peer: Any, prompts: Prompts, count: int) -> Prompts:
    rows = torch.tensor(prompts)
    with torch.inference_mode():
        out = peer.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=count, do_sample=False,
                            eos_token_id=None, pad_token_id=0)  # fmt: skip
    return out[:, rows.shape[1] :].tolist()


def seconds(work: Callable[[], Prompts]) -> tuple[float, Prompts]:
    started = time.perf_counter()
    made = work()
    return time.perf_counter() - started, made


def bandwidth() -> float:
    """Bytes per second that all threads read together from memory, the best of some tries."""
    block = torch.ones(100_000_000)
    block.sum()
    tries = []
    for _ in range(8):
        started = time.perf_counter()
        block.sum()
        tries.append(time.perf_counter() - started)
    return block.numel() * block.element_size() / min(tries)


def bytes_per_step(model: ModelStage, prompts: Prompts, count: int) -> float:
    """What a decode step reads at least, in the mean: weights that its tokens use, each once, and the latents."""
    length = len(prompts[0]) + count
    engine = Engine(model, length, CacheSize(len(prompts) * -(-length // 16), 16),
                    Limits(len(prompts), len(prompts) * len(prompts[0])))  # fmt: skip
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), count, GREEDY))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    dense = sum(p.numel() for p in model.parameters()) - experts - model.embedding.weight.numel()
    loads = engine.decoder.loads
    found: list[float] = []
    with torch.inference_mode():
        engine.step()
        while not engine.idle:
            before = {label: load.clone() for label, load in loads.items()}
            engine.step()
            used = sum(int((load > before[label]).sum()) for label, load in loads.items())
            weights = (dense + experts * used / (len(loads) * model.config.num_experts)) * 4
            latents = len(prompts) * (len(prompts[0]) + len(found)) * engine.decoder.cache.bytes_per_token
            found.append(weights + latents)
    return statistics.mean(found)


def fastest_experts(peer: Any, prompts: Prompts) -> str:
    """The peer's best way to compute experts here."""
    times = {}
    for name in EXPERTS:
        try:
            peer.set_experts_implementation(name)
            theirs(peer, prompts, 2)
        except Exception as error:  # a kernel that this machine does not have
            print(f"peer, experts={name}: not here ({type(error).__name__})")
            continue
        times[name] = seconds(lambda: theirs(peer, prompts, 6))[0]
        print(f"peer, experts={name}: {times[name]:.2f} s")
    best = min(times, key=lambda name: times[name])
    peer.set_experts_implementation(best)
    return best


def measure(models: dict[str, ModelStage], peer: Any, batch: int, prompt: int, count: int, rounds: int) -> list[Row]:
    """models: ours, by the value of `compile`."""
    generator = torch.Generator().manual_seed(batch)
    prompts: Prompts = torch.randint(0, 256, (batch, prompt), generator=generator).tolist()
    name = f"transformers, experts={fastest_experts(peer, prompts)}"
    sides: dict[str, Callable[[int], Prompts]] = {name: partial(ours, model, prompts) for name, model in models.items()}
    sides["theirs"] = partial(theirs, peer, prompts)
    rates: dict[tuple[str, str], list[float]] = {}
    made: dict[str, Prompts] = {}
    for run in sides.values():  # the first time, libraries lay out weights and make kernels
        run(2)
    for _ in range(rounds):
        for side, run in sides.items():
            first, _tokens = seconds(lambda run=run: run(1))  # type: ignore[misc]
            whole, made[side] = seconds(lambda run=run: run(1 + count))  # type: ignore[misc]
            rates.setdefault((side, "prefill"), []).append(batch * prompt / first)
            rates.setdefault((side, "decode"), []).append(batch * count / (whole - first))
    rows = []
    medians = {key: statistics.median(values) for key, values in rates.items()}
    least = bytes_per_step(models["off"], prompts, 1 + count) / bandwidth()
    for compile in models:
        same = sum(a == b for a, b in zip(made[compile], made["theirs"], strict=True))
        print(f"batch {batch}, compile={compile}: {same} of {batch} sequences have the peer's {1 + count} tokens")
        case = f"{batch} × ({prompt} + {count}) tokens, compile={compile}"
        for what in ("prefill", "decode"):
            rows.append(Row(case, f"{what}, tokens/s", medians[compile, what], name, medians["theirs", what]))
        rows.append(Row(case, "decode, tokens/s", medians[compile, "decode"], "bytes read ÷ memory bandwidth",
                        batch / least))  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    use_cpu(options.threads)
    config = load_preset(options.model, {"init_std": 0.1})  # wide enough that tokens are not all the same
    with tempfile.TemporaryDirectory() as folder:
        weights = weights_of(empty_model(config, "fp32"))
        path = Path(folder) / "exported"
        write_checkpoint(path, config, lambda names: {n: weights[n] for n in names}, "fp32", 4096)
        models = {"off": load_whole_model(path).stage}
        if suits(torch.empty(0)):
            models["on"] = load_whole_model(path, cpp=True).stage
        peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        rows = []
        for batch in (int(word) for word in options.batches.split(",")):
            rows += measure(models, peer, batch, options.prompt, options.tokens, options.rounds)
    publish(f"serving_{options.model}", rows)


if __name__ == "__main__":
    main()
