"""Runs that begin with the weights of another: from its checkpoint, and from its export in the public format."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
COMMON = [
    "parallel.pp=1", "schedule=one_f_one_b", "logger=none", "sample_tokens=0", "eval_batches=1", "eval_every=100",
    "save_every=100", "data.seq_len=64", "data.micro_batch_size=2", "schedule.micro_batches=2", "model.mtp_depth=1",
    "launch.threads=1",
]  # fmt: skip


def python(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200)


def train(folder: Path, run: str, *overrides: str | Path) -> list[dict[str, float]]:
    done = python("train.py", f"runs_dir={folder}", f"run={run}", *COMMON, *overrides)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


def final_loss(rows: list[dict[str, float]]) -> float:
    return next(row["val/loss"] for row in reversed(rows) if "val/loss" in row)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, and in `torn` a copy of its checkpoint of which a part is missing."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "first", "steps=6")
    torn = shutil.copytree(folder / "first" / "checkpoints" / "step_00000006", folder / "torn")
    next(torn.glob("*.distcp")).unlink()
    return folder


def still(loss: float, rows: list[dict[str, float]]) -> bool:
    """One step at a rate of nothing leaves the loss where it was."""
    return abs(final_loss(rows) - loss) < 1e-5 * loss


FROZEN = ("steps=1", "optim.lr=1e-12", "optim.lr_final=0", "balance=none")


@pytest.mark.slow
def test_a_run_begins_where_another_ended(first: Path) -> None:
    rows = [json.loads(line) for line in (first / "first" / "metrics.jsonl").read_text().splitlines()]
    assert "train/mtp_loss_1" in rows[0]
    loss = final_loss(rows)
    assert still(loss, train(first, "again", *FROZEN, f"init_from={first}/first"))
    assert not still(loss, train(first, "seed", *FROZEN))


@pytest.mark.slow
def test_export_loads_in_transformers_and_in_train_py(first: Path) -> None:
    done = python("-m", "training.hf", "export", first / "first", first / "hf", "--format", "fp32")
    assert done.returncode == 0, done.stderr
    peer = AutoModelForCausalLM.from_pretrained(first / "hf", dtype=torch.float32)
    assert sum(p.numel() for p in peer.parameters()) > 2e6
    words = python("-m", "training.hf", "config", first / "hf").stdout.split()
    assert "model.mtp_depth=1" in words
    loss = final_loss([json.loads(line) for line in (first / "first" / "metrics.jsonl").read_text().splitlines()])
    assert still(loss, train(first, "public", *FROZEN, *words))
    assert python("-m", "training.hf", "export", first / "first", first / "fp8", "--format", "fp8").returncode == 0


@pytest.mark.slow
def test_a_longer_context_goes_on_from_the_shorter(first: Path) -> None:
    rows = train(
        first, "long", "experiment=context_extension", f"init_from={first}/first", "model.rope_original_length=64",
        "data.seq_len=256", "data.micro_batch_size=2", "steps=2",
    )  # fmt: skip
    assert final_loss(rows) < 5.4  # uniform guessing: 5.55


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init_from=/nowhere"], "init_from=/nowhere is neither"),
        (["init_from={first}/torn"], "init_from={first}/torn: checkpoint {first}/torn cannot be used: __0_0.distcp is"),
        (["init_from={first}/first", "model.num_heads=2"], "set model.num_heads=4"),
        (["init_from={first}/first", "model.mtp_depth=0"], "set model.mtp_depth=1"),
    ],
)
@pytest.mark.slow
def test_what_does_not_fit_is_named(first: Path, overrides: list[str], message: str) -> None:
    words = [word.format(first=first) for word in overrides]
    done = python("train.py", f"runs_dir={first}", "run=bad", *COMMON, *words)
    assert done.returncode == 2
    assert message.format(first=first) in done.stderr
    assert not (first / "bad").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{first}/nothing", "{first}/out"], "{first}/nothing is neither a checkpoint nor a run with checkpoints"),
        (["{first}/torn", "{first}/out"], "checkpoint {first}/torn cannot be used: __0_0.distcp is missing"),
        (["{first}/first", "{first}/torn/run.json"], "Not a directory"),
        (["{first}/first", "{first}/out", "--shard-gb", "inf"], "--shard-gb inf must be positive"),
    ],
)
@pytest.mark.slow
def test_an_export_that_cannot_be_gives_one_line(first: Path, words: list[str], message: str) -> None:
    done = python("-m", "training.hf", "export", *(word.format(first=first) for word in words))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message.format(first=first) in done.stderr
    assert not (first / "out").exists()
