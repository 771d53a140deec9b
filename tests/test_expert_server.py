"""The command: servers on two ranks that share experts, over a real checkpoint, with a client on each."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from model.hf_files import write_checkpoint
from model.names import named_tensors
from model.sampling import Sampling
from model.stage import ModelStage
from parallel.whole import empty_model
from serving.engine import CacheSize, Engine
from serving.expert_server import ExpertServerOptions, check, main
from serving.sequence import Request
from serving.tokenizers import Bytes
from tests.alone import run_alone
from tests.test_decode import CONFIG

MODEL = replace(CONFIG, vocab_size=257)
ROOT = Path(__file__).parent.parent
PROMPTS = ("import torch", "def f(x):")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelStage]:
    folder = tmp_path_factory.mktemp("public") / "tiny"
    model = empty_model(MODEL, "fp64", seed=3)
    tensors = {name: tensor.detach() for name, tensor, _ in named_tensors(model)}
    write_checkpoint(folder, MODEL, lambda names: {name: tensors[name] for name in names}, "fp32", max_length=256)
    for tensor in tensors.values():
        tensor.copy_(tensor.float())
    return folder, model


def two_free_ports() -> int:
    """The first of two neighbours that are free."""
    for port in range(20_000 + int(time.time()) % 20_000, 60_000, 2):
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise AssertionError("no free ports")


def test_two_ranks_answer_like_one_engine_while_experts_move(checkpoint: tuple[Path, ModelStage]) -> None:
    folder, model = checkpoint
    port = two_free_ports()
    words = [f"checkpoint={folder}", f"port={port}", "precision=fp64", "threads=1", "drafts=true", "redundant=4",
             "placement_every=6", "overlap=true", "overlap_rows=2"]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*torchrun, "-m", "serving.expert_server", *words]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            servers = [httpx.Client(base_url=f"http://127.0.0.1:{port + rank}", timeout=60) for rank in range(2)]
            wait_for(servers, process)
            for _ in range(3):
                for prompt, server in zip(PROMPTS, servers, strict=True):
                    body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}
                    answer = server.post("/v1/completions", json=body)
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["choices"][0]["text"] == expected(model, prompt, 24)
            metrics = servers[1].get("/metrics").text
            assert "serving_expert_ranks 2.0" in metrics
            assert 'serving_expert_rank_imbalance{layer="1"}' in metrics
            swaps = next(float(line.split()[1]) for line in metrics.splitlines()
                         if line.startswith("serving_expert_swaps_total "))  # fmt: skip
            assert swaps > 0
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()


def wait_for(servers: list[httpx.Client], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    for server in servers:
        while True:
            try:
                assert server.get("/health").status_code == 200
                break
            except httpx.TransportError:
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                assert time.monotonic() < deadline
                time.sleep(0.2)


def expected(model: ModelStage, prompt: str, count: int) -> str:
    engine = Engine(model, 256, CacheSize(32, 8))
    with torch.inference_mode():
        tokens = run_alone(engine, Request("a", tuple(prompt.encode()), count, Sampling(0)))
    return Bytes().decode(tokens)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"redundant": -1}, "redundant=-1"),
        ({"policy": "best"}, "policy='best' is unknown; choose one of global, hierarchical"),
        ({"active": 3}, "active=3 experts on each of 2 ranks are fewer than the 8 experts; need at least 4"),
        ({"timeout": 0}, "timeout=0"),
        ({"overlap_rows": 0}, "overlap_rows=0"),
        ({"ranks_per_node": 0}, "ranks_per_node=0"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything(
    checkpoint: tuple[Path, ModelStage], words: dict[str, int | str], message: str
) -> None:
    options = ExpertServerOptions(checkpoint=str(checkpoint[0]))
    for name, value in words.items():
        setattr(options, name, value)
    with pytest.raises(ValueError, match=message):
        check(options, 2)


def test_it_says_how_it_wants_to_be_started(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint=nowhere"]) == 2
    assert "torchrun" in capsys.readouterr().err
