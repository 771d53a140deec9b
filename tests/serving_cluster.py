"""A serving cluster for tests: torchrun, a model of a few thousand parameters, and an HTTP client.

Nothing outlives a `with Cluster(...)` block, whatever becomes of it.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.peer import weights_of
from model.config import ModelConfig
from model.hf_files import write_checkpoint
from model.sampling import Sampling
from parallel.whole import empty_model, load_whole_model
from serving.engine import CacheSize, Engine
from serving.sequence import Request
from tests.alone import run_alone
from tests.job import ROOT
from tests.test_decode import CONFIG

BYTES: ModelConfig = replace(CONFIG, vocab_size=257)
STARTS_WITHIN = 90  # seconds, on a busy machine
ENDS_WITHIN = 30


def write_model(folder: Path) -> Path:
    """The small model with random weights, in the public format."""
    weights = weights_of(empty_model(BYTES, "fp32", seed=3))
    write_checkpoint(folder, BYTES, lambda names: {n: weights[n] for n in names}, "fp32", 512)
    return folder


class Cluster:
    """`torchrun -m serving.cluster` with these keys, on a free port; its output goes to a file."""

    def __init__(self, checkpoint: Path, ranks: int, keys: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._model = load_whole_model(checkpoint).stage
        self._expected: dict[tuple[str, int, Sampling | None], list[int]] = {}
        self._log = checkpoint.parent / f"{port}.log"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m",
                   "serving.cluster", f"checkpoint={checkpoint}", f"port={port}", "name=tiny", "threads=1",
                   *keys.split()]  # fmt: skip
        with self._log.open("w") as log:
            self.torchrun = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, limits=httpx.Limits(max_connections=None))

    def __enter__(self) -> Cluster:
        try:
            self.wait_until(lambda: "serving tiny on" in self.output, STARTS_WITHIN)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        family = [psutil.Process(self.torchrun.pid), *psutil.Process(self.torchrun.pid).children(recursive=True)]
        self.torchrun.terminate()
        _, alive = psutil.wait_procs(family, timeout=ENDS_WITHIN)
        for process in alive:
            process.kill()
        self.http.close()
        assert not alive, f"still there {ENDS_WITHIN} s after SIGTERM: {alive}\n{self.output}"

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_until(self, happened: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.torchrun.poll() is None, f"it has ended:\n{self.output}"
            assert time.monotonic() < deadline, f"not within {seconds} s:\n{self.output}"
            time.sleep(0.05)

    def engine(self, side: str, index: int) -> psutil.Process:
        """The engine process that now has this place."""
        for child in psutil.Process(self.torchrun.pid).children(recursive=True):
            words = child.cmdline()
            if "serving.engine_process" in words and f"side={side}" in words and f"index={index}" in words:
                return child
        raise AssertionError(f"there is no {side} process {index}:\n{self.output}")

    def ask(self, prompt: str, tokens: int, **more: Any) -> httpx.Response:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}
        return self.http.post("/v1/completions", json=body)

    def metric(self, name: str, labels: str = "") -> float:
        text = self.http.get("/metrics").text
        return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*{labels}.*}})? ([-+.e\d]+)$", text, re.M))

    def expected(self, prompt: str, tokens: int, sampling: Sampling | None = None) -> list[int]:
        """What one engine makes of it."""
        key = (prompt, tokens, sampling)
        if key not in self._expected:
            request = Request("a", tuple(prompt.encode()), tokens, sampling or Sampling(0), 256)
            self._expected[key] = run_alone(Engine(self._model, 512, CacheSize(128, 8)), request)
        return self._expected[key]
