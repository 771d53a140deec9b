"""The optimizer's part of a step on four ranks: ZeRO-1 against its peers, saving without stopping, what is hidden.

    .venv/bin/python -m benchmarks.optimizer [--hidden 256] [--rounds 7]

DualPipe PP 2 × DP 2 with EP 2. Three questions, each answered in this one run:

1. Reduction + norm + update + gathering: our ZeRO-1 (DeepSpeed, reduce-scatter) against our ZeRO-0 (all-reduce, every
   rank updates everything) and torch's ZeroRedundancyOptimizer (all-reduce, whole parameters per rank, broadcast), in
   turns on the same gradients. The slowest rank counts.
2. How long training is held up by an asynchronous save, against the same save waited for.
3. How long the step waits for the reduction after the pipeline, when each stage's sums start at its last W, against
   all sums after the pipeline; with a picture of one step (docs/images/reduction.png).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

from benchmarks.reduction_picture import Tail, save_tails
from benchmarks.report import Row, publish
from dualpipe.schedules import make_schedule
from dualpipe.timeline import COMPUTE
from model.batch import MicroBatch
from model.config import ModelConfig
from model.precisions import make_precision
from parallel.build import BuildOptions, Replica, build_replica
from parallel.grads import mirrors
from parallel.memory import measure, predict
from parallel.mesh import Layout, Mesh
from parallel.saved import RunState
from parallel.update import Update
from parallel.zero import load_deepspeed
from training.checkpoint import run_fragments
from training.checkpoint_writer import CheckpointWriter
from training.optimizer import OptimConfig, make_update
from training.step import train_step

ROOT = Path(__file__).parent.parent
RANKS, PP, EP, MICRO_BATCHES = 4, 2, 2, 8
MIRROR_OF_0 = 2
PICTURE = ROOT / "docs" / "images" / "reduction.png"


def build(mesh: Mesh, hidden: int) -> Replica:
    config = replace(
        ModelConfig(), hidden_size=hidden, dense_ffn_size=3 * hidden, expert_ffn_size=3 * hidden // 4, num_layers=4
    )
    precision, dtype = make_precision("fp32")
    schedule = make_schedule("dualpipe", PP, MICRO_BATCHES)
    return build_replica(config, schedule, mesh, precision, BuildOptions(param_dtype=dtype))


def slowest(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def timed(work: Callable[[], object]) -> float:
    dist.barrier()
    started = time.perf_counter()
    work()
    return slowest(time.perf_counter() - started)


def our_step(update: Update) -> None:
    update.finish_reduction()
    norm = update.gradient_norm()
    update.step(1e-4, min(1.0, 1.0 / norm))


class TorchZero:
    """torch's ZeroRedundancyOptimizer, one for dense parameters and one for experts, behind our reduction and norm."""

    def __init__(self, replica: Replica) -> None:
        self.buckets, self.mesh = replica.buckets, replica.mesh
        self.optimizers = []
        for routed, group in ((False, replica.mesh.dense), (True, replica.mesh.experts)):
            parameters = [p for b in self.buckets if b.routed == routed for p in b.parameters]
            self.optimizers.append(
                ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, process_group=group, lr=1e-4, fused=True)
            )

    def step(self) -> None:
        works = [dist.all_reduce(b.grads, group=b.group, async_op=True) for b in self.buckets]
        for work in works:
            work.wait()
        square = torch.zeros((), dtype=torch.float64)
        for b in self.buckets:
            square += torch.linalg.vector_norm(b.grads[b.share], dtype=torch.float64).square()
        dist.all_reduce(square)
        for b in self.buckets:
            b.grads.mul_(min(1.0, 1.0 / float(square.sqrt())))
        for optimizer in self.optimizers:
            optimizer.step()


def fill(replica: Replica) -> None:
    for bucket in replica.buckets:
        bucket.grads.normal_(std=1e-3)


def compare_updates(mesh: Mesh, hidden: int, rounds: int) -> tuple[list[Row], Update]:
    replicas = {name: build(mesh, hidden) for name in ("ZeRO-1", "ZeRO-0", "ZeroRedundancyOptimizer")}
    stages = (("ZeRO-1", 1), ("ZeRO-0", 0))
    updates = {name: make_update(replicas[name], OptimConfig(zero=stage)) for name, stage in stages}
    peer = TorchZero(replicas["ZeroRedundancyOptimizer"])
    works: dict[str, Callable[[], None]] = {
        "ZeRO-1": lambda: our_step(updates["ZeRO-1"]),
        "ZeRO-0": lambda: our_step(updates["ZeRO-0"]),
        "ZeroRedundancyOptimizer": peer.step,
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 2):
        for name, work in works.items():
            fill(replicas[name])
            seconds = timed(work)
            if turn >= 2:
                times[name].append(seconds)
    ours = statistics.median(times["ZeRO-1"])
    rows = [
        Row("reduce + norm + update", "ms", 1e3 * ours, name, 1e3 * statistics.median(times[name]))
        for name in ("ZeRO-0", "ZeroRedundancyOptimizer")
    ]
    print_memory(replicas["ZeRO-1"], updates["ZeRO-1"], replicas["ZeRO-0"], updates["ZeRO-0"])
    updates["ZeRO-1"].close()
    return rows, updates["ZeRO-0"]


def print_memory(sharded: Replica, one: Update, plain: Replica, zero: Update) -> None:
    if one.mesh.rank:
        return
    print("\nMB on rank 0, formula / measured")
    print(f"{'':10}{'weights':>18}{'gradients':>18}{'masters':>18}{'moments':>18}")
    for name, replica, update, stage in (("ZeRO-0", plain, zero, 0), ("ZeRO-1", sharded, one, 1)):
        wanted, found = predict(replica.stages.values(), 4, 2, stage, 4), measure(update)
        kinds = ("weights", "gradients", "masters", "moments")
        cells = [(getattr(wanted, kind) / 1e6, getattr(found, kind) / 1e6) for kind in kinds]
        print(f"{name:10}" + "".join(f"{f'{a:.2f} / {b:.2f}':>18}" for a, b in cells))


def compare_saves(update: Update, mesh: Mesh, rounds: int, folder: Path) -> Row:
    writer = CheckpointWriter(folder, mesh, keep_last=1)
    pauses, whole = [], []
    for step in range(rounds + 1):
        state = RunState(step, 0, 0, 0, {}, "id", RANKS)
        dist.barrier()
        started = time.perf_counter()
        writer.save(state, run_fragments({}, update, mesh, owned=True))
        pause = slowest(time.perf_counter() - started)
        writer.wait()
        total = slowest(time.perf_counter() - started)
        if step:
            pauses.append(pause)
            whole.append(total)
    writer.close()
    pause, total = (1e3 * statistics.median(times) for times in (pauses, whole))
    return Row("save", "ms of pause", pause, "synchronous save", total)


class Late:
    """An Update that starts all sums after the pipeline."""

    def __init__(self, update: Update) -> None:
        self._update = update

    def __getattr__(self, name: str) -> object:
        return getattr(self._update, name)

    def stage_done(self, stage: int) -> None: ...


def compare_overlap(mesh: Mesh, hidden: int, rounds: int) -> Row:
    replica = build(mesh, hidden)
    update = make_update(replica, OptimConfig(zero=1))
    generator = torch.Generator().manual_seed(mesh.dp)
    tokens = torch.randint(0, 257, (2, 65), generator=generator)
    documents, positions = torch.zeros(2, 64, dtype=torch.int64), torch.arange(64).expand(2, 64)
    micro_batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], documents, positions)
    waits: dict[str, list[float]] = {"early": [], "late": []}
    update.record = True
    replica.pipeline.record = True
    for turn in range(rounds + 1):
        for name, which in (("late", Late(update)), ("early", update)):
            result = train_step(replica, which, [micro_batch] * MICRO_BATCHES, 1e-4, 1.0, 0.001)  # type: ignore[arg-type]
            waited = slowest(sum(end - waiting for _, _, waiting, end in update.spans))
            if turn:
                waits[name].append(waited)
    draw_tail(replica, update, result.seconds["pipeline"])
    update.close()
    early, late = (1e3 * statistics.median(waits[name]) for name in ("early", "late"))
    return Row("wait for the reduction", "ms", early, "all sums after the pipeline", late)


def draw_tail(replica: Replica, update: Update, pipeline: float) -> None:
    """The last step's end on rank 0 and the rank that mirrors it, as a picture; `pipeline` in seconds."""
    end = update.spans[0][2]
    mine = Tail(
        replica.mesh.rank,
        tuple((s.label, 1e3 * (s.start - pipeline), 1e3 * (s.end - pipeline))
              for s in replica.pipeline.spans if s.lane == COMPUTE),
        tuple((label, *(1e3 * (t - end) for t in times)) for label, *times in update.spans),
    )  # fmt: skip
    tails: list[Tail | None] = [None] * RANKS
    dist.all_gather_object(tails, mine)
    if replica.mesh.rank == 0:
        shown = [tail for tail in tails if tail is not None and tail.rank in (0, MIRROR_OF_0)]
        title = "The end of a step: DualPipe PP 2 × DP 2, EP 2, ZeRO-1; rank 0 and its mirror"
        save_tails(shown, PICTURE, title, -150.0)
        print(PICTURE.relative_to(ROOT))


def worker(hidden: int, rounds: int, folder: Path) -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    load_deepspeed(torch.device("cpu"))
    dist.init_process_group("gloo")
    layout, schedule = Layout(RANKS, PP, EP), make_schedule("dualpipe", PP, MICRO_BATCHES)
    mesh = Mesh.create(layout, mirrors(schedule), timedelta(seconds=120))
    make_update(build(mesh, 32), OptimConfig(zero=1)).close()
    ready = slowest(time.perf_counter() - started)
    rows, plain = compare_updates(mesh, hidden, rounds)
    rows.append(compare_saves(plain, mesh, rounds, folder))
    rows.append(compare_overlap(mesh, hidden, rounds))
    rows.append(Row("import DeepSpeed, first ZeRO-1 optimizer", "s", ready, "limit of the issue", 10.0))
    if mesh.rank == 0:
        numel = sum(b.numel for b in plain.buckets)
        print(f"\n{numel / 1e6:.1f}M parameters on a rank")
        publish("optimizer", rows)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if "RANK" in os.environ:
        worker(options.hidden, options.rounds, Path(os.environ["OPTIMIZER_FOLDER"]))
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"]
        command += ["-m", "benchmarks.optimizer"]
        command += [f"--hidden={options.hidden}", f"--rounds={options.rounds}"]
        environment = {**os.environ, "OPTIMIZER_FOLDER": folder, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, check=True, env=environment)


if __name__ == "__main__":
    main()
