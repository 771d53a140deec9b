"""How often MTP drafts are right, and what that is worth, on text that the model has not seen.

    .venv/bin/python -m benchmarks.serving_drafts [--steps 200]            trains the quickstart's model with MTP first
    .venv/bin/python -m benchmarks.serving_drafts --checkpoint runs/mtp

Prompts are the beginnings of rows of the validation split, bytes of Python's own library; every engine continues the
same ones. Without drafts and with them, in turns; the median of three rounds counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.report import Row, publish
from model.sampling import Sampling
from parallel.whole import WholeModel, load_whole_model
from serving.engine import CacheSize, Engine
from serving.scheduler import Limits
from serving.sequence import Request
from training.corpus import prepare_corpus

ROOT = Path(__file__).parent.parent
PROMPT, TOKENS, ROUNDS = 96, 128, 3
SETTINGS = [
    "parallel.pp=1", "schedule=one_f_one_b", "model.mtp_depth=1", "logger=none", "sample_tokens=0",
]  # fmt: skip


def train(folder: str, steps: int) -> Path:
    """The quickstart's model and data, with an MTP module, in one process."""
    words = [f"runs_dir={folder}", "run=mtp", f"steps={steps}", f"save_every={steps}", f"eval_every={steps}", *SETTINGS]
    subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True, env={**os.environ})
    return Path(folder) / "mtp"


def prompts(count: int) -> list[tuple[int, ...]]:
    """From places spread over the validation text, without ends of documents."""
    tokens = prepare_corpus(None, ROOT / ".cache" / "corpus", 0.05).tokens("val")
    found: list[tuple[int, ...]] = []
    for start in range(0, len(tokens) - PROMPT, max(1, len(tokens) // (4 * count))):
        row = tuple(int(t) for t in tokens[start : start + PROMPT])
        if max(row) < 256 and len(found) < count:
            found.append(row)
    return found


def run(model: WholeModel, rows: list[tuple[int, ...]], temperature: float, drafts: bool) -> tuple[float, Engine]:
    """Tokens per second of all of it, and the engine with its counters."""
    pages = len(rows) * -(-(PROMPT + TOKENS) // 16)
    engine = Engine(model.stage, PROMPT + TOKENS, CacheSize(pages, 16), Limits(len(rows), 2048), drafts)
    for i, row in enumerate(rows):
        engine.add(Request(str(i), row, TOKENS, Sampling(temperature, seed=i)))
    started = time.perf_counter()
    with torch.inference_mode():
        while not engine.idle:
            engine.step()
    return engine.counters.made / (time.perf_counter() - started), engine


def measure(model: WholeModel, batch: int, temperature: float) -> list[Row]:
    rows = prompts(batch)
    run(model, rows[:1], temperature, drafts=True)
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for drafts, values in rates.items():
            rate, engine = run(model, rows, temperature, drafts)
            values.append(rate)
    plain, drafting = (statistics.median(rates[drafts]) for drafts in (False, True))
    case = f"batch {batch}, temperature {temperature:g}"
    return [
        Row(case, "share of drafts taken", engine.counters.acceptance, "all", 1.0),
        Row(case, "tokens/s", drafting, "without drafts", plain),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = options.checkpoint or train(folder, options.steps)
        model = load_whole_model(path)
        print(f"weights: {model.folder.name}")
        rows = [row for batch in (1, 16) for temperature in (0.0, 0.7) for row in measure(model, batch, temperature)]
    publish("serving_drafts", rows)


if __name__ == "__main__":
    main()
