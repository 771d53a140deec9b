"""200 command lines that somebody might mistype: each trains, or ends soon with one clear message. None hangs.

A valid command line is changed at random: another value, a slip in a key, a word lost or doubled. It is then run as
`train.py` would run it, in a process of its own that a fork server starts with everything imported, so that hundreds
fit into minutes. A process that does not end within 20 s is a failure, and so is a traceback.
"""

from __future__ import annotations

import contextlib
import os
import random
import runpy
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.job import MODEL, ROOT, SIZE, write_text
from tests.spawn import fork_server
from training.config import Config, to_dict

WITHIN = 20  # seconds
MUTATIONS = 200
BASES = (
    "parallel.pp=1",
    "parallel.pp=1 schedule=one_f_one_b schedule.micro_batches=1 precision=bf16",
    "parallel.pp=1 balance=none optim.clip=0 logger=none",
    "parallel.pp=1 schedule=gpipe data.val_fraction=0.2 optim.lr=1e-4 eval_batches=1",
    "parallel.pp=1 parallel.overlap=off precision=fp64 resume=never",
)
VALUES = (
    *("0", "-1", "1", "2", "3", "7", "1.5", "-0.5", "1e-3", "1e30", "nan", "inf", "99999999999999999999", "1000000"),
    *("null", "true", "''", "x", "[]", "[1]", "[1,2]", "{a:1}", "ä", "a b"),
    *("../x", "${nokey}", "$HOME", "\\", "'", "["),
    *("dualpipe", "zbv", "fp32", "auto", "off", "/dev/null", "/no/such/place"),
)


@dataclass(frozen=True)
class Outcome:
    code: int | None  # None: it had to be killed
    output: str


def keys(value: object, prefix: str = "") -> list[str]:
    if isinstance(value, dict):
        return [key for name, inner in value.items() for key in keys(inner, f"{prefix}{name}.")]
    return [prefix[:-1]]


# Where a run writes is left alone, and so is what only asks for more steps.
KEYS = [k for k in keys(to_dict(Config())) if k not in ("runs_dir", "data.cache_dir", "steps", "run")]


def mutated(number: int) -> list[str]:
    """The words of the number-th command line: a valid one with one or two changes."""
    rng = random.Random(number)
    words = rng.choice(BASES).split()
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(len(words)) if words else 0
        change = rng.choice(("value", "value", "add", "add", "slip", "lose", "double", "double", "cut", "group"))
        if change == "add" or not words:
            words.append(f"{rng.choice(KEYS)}={rng.choice(VALUES)}")
        elif change == "value":
            words[place] = f"{words[place].partition('=')[0]}={rng.choice(VALUES)}"
        elif change == "slip":
            at = rng.randrange(len(words[place]))
            words[place] = words[place][:at] + rng.choice("abz._=-+~ ") + words[place][at + rng.randint(0, 1) :]
        elif change == "lose":
            del words[place]
        elif change == "double":
            words.append(words[place])
        elif change == "cut":
            words[place] = words[place][: rng.randrange(len(words[place]))]
        else:
            words.append(f"{rng.choice(('model', 'schedule', 'precision', 'optim', 'nogroup'))}={rng.choice(VALUES)}")
    return [word for word in words if word]


def train(words: list[str], folder: str) -> None:
    """What `python train.py …` does, with its output in a file."""
    with open(f"{folder}/output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w")
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w")
    os.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    sys.argv = ["train.py", *words]
    try:
        runpy.run_path("train.py", run_name="__main__")
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()


def run(number: int, places: list[str]) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        words = [*MODEL.split(), *SIZE.split(), *places, f"runs_dir={folder}/runs", "logger=none", *mutated(number)]
        process = fork_server().Process(target=train, args=(words, folder), daemon=True)
        process.start()
        process.join(WITHIN * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))  # others use the cores too
        code = process.exitcode
        process.kill()
        process.join()
        return Outcome(code, Path(folder, "output").read_text(errors="replace"))


@pytest.mark.slow
def test_every_mistyped_command_line_trains_or_says_what_is_wrong(tmp_path: Path) -> None:
    write_text(tmp_path)
    places = [f"data.path={tmp_path}/text", f"data.cache_dir={tmp_path}/cache", "steps=1", "sample_tokens=0"]
    places.append("launch.threads=1")  # OpenMP threads on a busy machine wait for each other for seconds
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda number: run(number, places), range(MUTATIONS)))
    wrong = []
    for number, outcome in enumerate(outcomes):
        clear = outcome.code == 0 or (outcome.code is not None and outcome.output.strip() != "")
        if not clear or "Traceback" in outcome.output:
            wrong.append(f"{' '.join(mutated(number))}\n  exit code {outcome.code}: {outcome.output[-1500:]}")
    assert not wrong, f"{len(wrong)} of {MUTATIONS}:\n" + "\n".join(wrong)
    trained = sum(outcome.code == 0 for outcome in outcomes)
    assert 20 <= trained <= MUTATIONS - 60, f"{trained} trained: the mutations prove little"
