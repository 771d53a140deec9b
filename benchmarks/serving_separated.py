"""Prefill and decode in separate processes against processes that do both: latencies under a Poisson load.

    .venv/bin/python -m benchmarks.serving_separated [--rate 2] [--seconds 30]

Two engine processes of one thread each in every case, behind the same front, over HTTP with streams:

    separated      prefill=1 decode=1
    together 512   together=2, prompts read in pieces of up to 512 tokens beside the others' next tokens
    together 128   the same with pieces of up to 128 tokens: shorter steps, later first tokens

All three are up at once and idle but for the one that is measured; rounds take turns, with the same arrivals, prompts
and lengths. Latencies are a client's: from sending a request to its first token, and from token to token. Quantiles are
over all rounds. Weights are random, but never make an end of text or a byte that is not printed at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from benchmarks.peer import weights_of
from benchmarks.report import Row, publish
from model.__main__ import load_preset
from model.hf_files import write_checkpoint
from parallel.whole import empty_model

ROOT = Path(__file__).parent.parent
SEPARATED = "separated"
CASES = {
    SEPARATED: "prefill=1 decode=1",
    "together 512": "together=2 prefill=0 decode=0 batch_tokens=512",
    "together 128": "together=2 prefill=0 decode=0 batch_tokens=128",
}


@dataclass(frozen=True)
class Arrival:
    """at: seconds after the start."""

    at: float
    prompt: str
    tokens: int


@dataclass
class Times:
    """Seconds. first: from sending to the first token; between: from token to token."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


class Cluster:
    """`torchrun -m serving.cluster`, two ranks."""

    def __init__(self, checkpoint: Path, keys: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [f"checkpoint={checkpoint}", f"port={port}", "name=bench", "threads=1", *keys.split()]
        self.url = f"http://127.0.0.1:{port}"
        self._errors = checkpoint.parent / f"{port}.log"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "serving.cluster", *words],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
            stderr=self._errors.open("w"), text=True,
        )  # fmt: skip

    def wait(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if "serving bench" not in line:
            raise RuntimeError(f"the cluster did not start: {line!r}\n{self._errors.read_text()}")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


def arrivals(rate: float, seconds: float, prompts: tuple[int, int], tokens: int, seed: int) -> list[Arrival]:
    """A Poisson process; prompt lengths are uniform between two bounds."""
    chance, at, found = random.Random(seed), 0.0, []
    while (at := at + chance.expovariate(rate)) < seconds:
        prompt = "".join(chr(chance.randrange(32, 127)) for _ in range(chance.randint(*prompts)))
        found.append(Arrival(at, prompt, tokens))
    return found


async def ask(http: httpx.AsyncClient, url: str, arrival: Arrival, begun: float, times: Times) -> None:
    await asyncio.sleep(max(0.0, begun + arrival.at - time.perf_counter()))
    body = {"model": "bench", "prompt": arrival.prompt, "max_tokens": arrival.tokens, "temperature": 0, "stream": True}
    latest, seen = time.perf_counter(), 0
    async with http.stream("POST", f"{url}/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            text = json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            now = time.perf_counter()
            if len(text) != 1:
                raise RuntimeError(f"one token at a time was to come, not {text!r}")
            (times.between if seen else times.first).append(now - latest)
            latest, seen = now, seen + 1
    if seen != arrival.tokens:
        raise RuntimeError(f"{seen} of {arrival.tokens} tokens came")


async def play(url: str, load: list[Arrival], times: Times) -> None:
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as http:
        begun = time.perf_counter()
        await asyncio.gather(*(ask(http, url, arrival, begun, times) for arrival in load))


def write_model(folder: Path, name: str, length: int) -> Path:
    """A preset with random weights. Tokens other than printable ASCII have the logit 0, which never wins."""
    config = load_preset(name, {"init_std": 0.1})
    stage = empty_model(config, "fp32")
    head = stage.head.weight.detach()
    head[:32], head[127:] = 0, 0
    weights = weights_of(stage)
    write_checkpoint(folder, config, lambda names: {n: weights[n] for n in names}, "fp32", length)
    return folder


def rows(times: dict[str, Times], rate: float) -> list[Row]:
    found = []
    ours = times[SEPARATED]
    for peer in times.keys() - {SEPARATED}:
        for what, mine, theirs in (("time to first token", ours.first, times[peer].first),
                                   ("between tokens", ours.between, times[peer].between)):  # fmt: skip
            for name, q in (("median", 0.5), ("p99", 0.99)):
                pair = (float(np.quantile(mine, q)), float(np.quantile(theirs, q)))
                found.append(Row(f"{rate:g} requests/s", f"{what}, {name}, ms", 1e3 * pair[0], peer, 1e3 * pair[1]))
    return sorted(found, key=lambda row: (row.peer, row.metric))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=30.0, help="of arrivals, per round and case")
    parser.add_argument("--prompt", type=int, nargs=2, default=(256, 768), help="tokens, at least and at most")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    times = {case: Times() for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "model", options.model, 2 * options.prompt[1])
        clusters = {case: Cluster(path, keys) for case, keys in CASES.items()}
        try:
            for cluster in clusters.values():
                cluster.wait()
                asyncio.run(play(cluster.url, arrivals(4, 2, (300, 600), 8, 99), Times()))  # everybody is warm
            for round_ in range(options.rounds):
                load = arrivals(options.rate, options.seconds, tuple(options.prompt), options.tokens, round_)
                for case, cluster in clusters.items():
                    asyncio.run(play(cluster.url, load, times[case]))
                    print(f"round {round_}, {case}: {len(load)} requests", flush=True)
        finally:
            for cluster in clusters.values():
                cluster.stop()
    publish("serving_separated", rows(times, options.rate))


if __name__ == "__main__":
    main()
