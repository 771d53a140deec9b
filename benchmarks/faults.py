"""What becomes of a run when something breaks: the table of docs/faults.md.

    python -m benchmarks.faults              every fault; two of them (nodes, a small disk) need Linux and root
    python -m benchmarks.faults sigstop nan  some of them

A model of a few thousand parameters on two ranks (four for the lost node) under launch/torchrun.sh, a checkpoint every
5 steps, launch.timeout_seconds=10. Each fault is made in a running job, from outside. Measured are the seconds until
the run reacts (its first message, or the end of its process), the seconds until it has trained a step it had not
trained before, and the steps that had to be done again or are lost.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.report import RESULTS, machine
from launch.virtual_cluster import VirtualCluster
from launch.virtual_network import VirtualNetwork, why_not
from tests.job import MODEL, ROOT, SIZE, TORCHRUN, Job, checkpoints, losses, steps_done, write_text

LOOP = (
    "steps=60 save_every=5 keep_last=3 eval_every=60 sample_tokens=0 logger=none "
    "launch.timeout_seconds=10 launch.threads=1"
)
SAME, NOT_SAME = "bit-equal to the undisturbed run", "DIFFERENT"
SCRIPT = [str(ROOT / "launch" / "torchrun.sh")]
TWO_RANKS = {"NPROC_PER_NODE": "2"}


@dataclass(frozen=True)
class Outcome:
    """seconds_until_noticed, seconds_until_new_step (None: it does not go on by itself), steps_lost, what is said."""

    fault: str
    seconds_until_noticed: float | None
    seconds_until_new_step: float | None
    steps_lost: int
    ends_with: str
    says: str


def newest_step(run_dir: Path) -> int:
    found = checkpoints(run_dir)
    return int(found[-1].removeprefix("step_")) if found else 0


def until(happened: Callable[[], bool], limit: float = 120) -> float:
    """Seconds until something happens. Raises TimeoutError after the limit."""
    began = time.monotonic()
    while not happened():
        if time.monotonic() - began > limit:
            raise TimeoutError(f"nothing happened in {limit:.0f} s")
        time.sleep(0.02)
    return time.monotonic() - began


def first(pattern: str, text: str) -> str:
    """The first line that holds the pattern, without the paths in it."""
    line = next((li for li in text.splitlines() if re.search(pattern, li)), "")
    return re.sub(r"/\S*/(?=\S)", "", line).strip()[:160]


def when_ready(job: Job, run_dir: Path) -> int:
    """Wait until the run has a checkpoint and is some steps past it; returns the step."""
    job.wait_until(lambda: newest_step(run_dir) >= 5 and steps_done(run_dir) >= newest_step(run_dir) + 2)
    return steps_done(run_dir)


def restarted(folder: Path, name: str, fault: str, strike: Callable[[Job], None]) -> Outcome:
    """A fault after which torchrun starts the ranks again."""
    run_dir = folder / name
    with Job(folder, name, LOOP, SCRIPT, TWO_RANKS) as job:
        done = when_ready(job, run_dir)
        strike(job)
        resumed_from = newest_step(run_dir)
        noticed = until(lambda: "] failed " in job.output or "Sending process" in job.output)
        again = until(lambda: job.output.count("node  ranks") > 1)
        again += until(lambda: steps_done(run_dir) > done)
        job.finish()
        said = first(r"\[rank \d+\] failed|Timed out|imed out waiting|Connection", job.output)
    equal = SAME if losses(run_dir) == losses(folder / "whole") else NOT_SAME
    return Outcome(fault, noticed, noticed + again, done - resumed_from, equal, said)


def sigkill(folder: Path) -> Outcome:
    return restarted(folder, "sigkill", "SIGKILL of a rank", lambda job: job.rank(1).kill())


def sigstop(folder: Path) -> Outcome:
    return restarted(folder, "sigstop", "SIGSTOP of a rank", lambda job: job.rank(1).suspend())


def node(folder: Path) -> Outcome:
    name, run_dir = "node", folder / "node"
    places = f"run={name} runs_dir={folder} data.path={folder / 'text'} data.cache_dir={folder / 'cache'}"
    overrides = f"{MODEL} {SIZE} {places} {LOOP} parallel.pp=4 model.num_layers=4 schedule.micro_batches=8".split()
    with VirtualNetwork(2) as network, VirtualCluster(network, 2, overrides) as cluster:
        cluster.start_all()
        until(lambda: newest_step(run_dir) >= 5 and steps_done(run_dir) >= newest_step(run_dir) + 2)
        done = steps_done(run_dir)
        cluster.lose(1)
        resumed_from = newest_step(run_dir)
        began = time.monotonic()
        noticed = until(lambda: "] failed " in cluster.output(0))
        cluster.start(1)  # what Slurm or Kubernetes do
        until(lambda: cluster.output(0).count("node  ranks") > 1)
        until(lambda: steps_done(run_dir) > done)
        again = time.monotonic() - began
        codes = cluster.wait(120)
        said = first(r"\[rank \d+\] failed", cluster.output(0))
    return Outcome("SIGKILL of a node", noticed, again, done - resumed_from, f"exit codes {codes}", said)


def sigterm(folder: Path) -> Outcome:
    run_dir = folder / "sigterm"
    with Job(folder, "sigterm", LOOP, SCRIPT, TWO_RANKS) as job:
        when_ready(job, run_dir)
        os.kill(job.torchrun.pid, signal.SIGTERM)
        noticed = until(lambda: job.torchrun.poll() is not None)
        said = first("stopped after", job.output)
    lost = steps_done(run_dir) - newest_step(run_dir)
    return Outcome("SIGTERM", noticed, None, lost, f"exit code {job.torchrun.returncode}", said)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def full_disk(folder: Path) -> Outcome:
    with small_disk(folder) as disk:
        write_text(disk)
        run_dir = disk / "full"
        with Job(disk, "full", LOOP, SCRIPT, TWO_RANKS) as job:
            when_ready(job, run_dir)
            room = os.statvfs(disk)
            with (disk / "filler").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - 65536)
            noticed = until(lambda: "stopped after" in job.output)
            job.torchrun.wait(timeout=60)
            said = first("stopped after", job.output)
            stopped = re.search(r"stopped after step (\d+)", said)
        lost = int(stopped[1]) - newest_step(run_dir) if stopped else -1
        code = f"exit code {job.torchrun.returncode}"
    return Outcome("full disk", noticed, None, lost, code, said)


def damaged(folder: Path, name: str, fault: str, damage: Callable[[Path], None]) -> Outcome:
    """The largest file of the newest checkpoint is damaged between two runs; seconds count from the second's start."""
    run_dir = folder / name
    with Job(folder, name, LOOP, SCRIPT, TWO_RANKS) as job:
        when_ready(job, run_dir)
        os.kill(job.torchrun.pid, signal.SIGTERM)
        job.finish()
    done = newest_step(run_dir)
    newest, before = run_dir / "checkpoints" / checkpoints(run_dir)[-1], checkpoints(run_dir)[-2]
    damage(max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size))
    with Job(folder, name, LOOP, SCRIPT, TWO_RANKS) as job:
        noticed = until(lambda: newest.name in job.output)
        again = noticed + until(lambda: steps_done(run_dir) > done)
        said = first(newest.name, job.output)
        job.finish()
    same = SAME if losses(run_dir) == losses(folder / "whole") else NOT_SAME
    return Outcome(fault, noticed, again, done - int(before.removeprefix("step_")), same, said)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flipped(folder: Path) -> Outcome:
    return damaged(folder, "flipped", "one bit flipped in the newest checkpoint", flip)


def truncated(folder: Path) -> Outcome:
    return damaged(folder, "truncated", "shard truncated", lambda path: os.truncate(path, path.stat().st_size // 2))


def missing(folder: Path) -> Outcome:
    return damaged(folder, "missing", "shard missing", Path.unlink)


def poisoned(folder: Path, when: str) -> Outcome:
    """A number of rank 1's gradient is NaN in step 10; seconds are those of steps: it is noticed at a step's end."""
    run_dir = folder / f"nan_{when}"
    command = [*TORCHRUN, "-m", "benchmarks.poisoned_train"]
    with Job(folder, run_dir.name, LOOP, command, {"POISON_STEP": "10", "POISON": when}) as job:
        job.finish()
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    rows = {row["step"]: row for row in lines if "train/loss" in row}
    skipped = [step for step, row in rows.items() if row.get("train/skipped")]
    bad = [step for step, row in rows.items() if not math.isfinite(float(row.get("train/loss", 0)))]
    seconds = [sum(v for k, v in rows[step].items() if k.startswith("seconds/")) for step in (10, 11)]
    noticed = seconds[0] if skipped[:1] == [10] else None
    said = f"metrics: train/skipped = 1 in step {skipped}, train/grad_norm {rows[10]['train/grad_norm']}"
    ends = f"exit code {job.torchrun.returncode}, loss {'not finite' if bad else 'finite'} in all steps"
    return Outcome(f"NaN in one rank's gradient, {when} the sum", noticed, sum(seconds), len(skipped), ends, said)


def nan(folder: Path) -> Outcome:
    return poisoned(folder, "before")


def nan_after(folder: Path) -> Outcome:
    return poisoned(folder, "after")


def slow(folder: Path) -> Outcome:
    """Rank 1 is held still for three quarters of the time until it is named, at most 30 steps; log_every=5."""
    run_dir = folder / "slow"
    with Job(folder, "slow", f"{LOOP} log_every=5", SCRIPT, TWO_RANKS) as job:
        start = when_ready(job, run_dir)
        normal = until(lambda: steps_done(run_dir) >= start + 15) / 15
        start, began, victim = steps_done(run_dir), time.monotonic(), job.rank(1)
        noticed, earlier = None, job.output.count("rank 1 computes")
        while noticed is None and steps_done(run_dir) < start + 30:
            victim.suspend()
            time.sleep(0.09)
            victim.resume()
            time.sleep(0.03)
            if job.output.count("rank 1 computes") > earlier:
                noticed = time.monotonic() - began
        held = (time.monotonic() - began) / max(1, steps_done(run_dir) - start)
        job.finish()
        said = first("rank 1 computes", job.output) or "nothing"
    same = SAME if losses(run_dir) == losses(folder / "whole") else NOT_SAME
    said = f"a step takes {held / normal:.1f}×; {said}"
    return Outcome("slow rank (held still for 3/4 of the time)", noticed, 0.0, 0, same, said)


FAULTS: dict[str, Callable[[Path], Outcome]] = {
    "sigkill": sigkill, "node": node, "sigstop": sigstop, "sigterm": sigterm, "full_disk": full_disk,
    "flipped": flipped, "truncated": truncated, "missing": missing, "nan": nan, "nan_after": nan_after, "slow": slow,
}  # fmt: skip
ORDER = (
    "SIGKILL of a rank", "SIGKILL of a node", "SIGSTOP of a rank", "SIGTERM", "full disk",
    "one bit flipped in the newest checkpoint", "shard truncated", "shard missing",
    "NaN in one rank's gradient, before the sum", "NaN in one rank's gradient, after the sum",
    "slow rank (held still for 3/4 of the time)",
)  # fmt: skip
NEED_ROOT = ("node", "full_disk")


def table(outcomes: list[Outcome]) -> str:
    def cell(seconds: float | None) -> str:
        return "–" if seconds is None else f"{seconds:.1f}"

    head = "| fault | noticed after (s) | new step after (s) | steps lost | ends | says |"
    rows = [head, "|---|---|---|---|---|---|"]
    rows += [
        f"| {o.fault} | {cell(o.seconds_until_noticed)} | {cell(o.seconds_until_new_step)} | {o.steps_lost} | "
        f"{o.ends_with} | {o.says} |"
        for o in outcomes
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; default: all")
    chosen = parser.parse_args().faults or list(FAULTS)
    unknown = [name for name in chosen if name not in FAULTS]
    if unknown:
        parser.error(f"unknown faults {', '.join(unknown)}; choose of {', '.join(FAULTS)}")
    outcomes: list[Outcome] = []
    measured: list[Outcome] = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_text(folder)
        with Job(folder, "whole", LOOP, SCRIPT, TWO_RANKS) as job:
            job.finish()
        for name in chosen:
            if name in NEED_ROOT and (reason := why_not()) is not None:
                print(f"{name} left out: {reason}", flush=True)
                continue
            outcomes.append(FAULTS[name](folder))
            print(table(outcomes[-1:]).splitlines()[-1], flush=True)
            measured = write(outcomes)
    print("\n" + table(measured))


def write(outcomes: list[Outcome]) -> list[Outcome]:
    """Put these into the results, in the place of older ones of the same faults; returns all, in the usual order."""
    path = RESULTS / "faults.json"
    known = [Outcome(**row) for row in json.loads(path.read_text())["outcomes"]] if path.exists() else []
    by_name = {outcome.fault: outcome for outcome in (*known, *outcomes)}
    ordered = sorted(by_name.values(), key=lambda o: ORDER.index(o.fault) if o.fault in ORDER else len(ORDER))
    RESULTS.mkdir(exist_ok=True)
    data = {"outcomes": [asdict(outcome) for outcome in ordered], "machine": machine()}
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return ordered


if __name__ == "__main__":
    main()
