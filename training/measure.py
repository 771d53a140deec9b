"""`python -m training.measure out=costs.json model=…`: what the layers of a model cost here.

Runs a few micro-batches of a model with one layer of each kind, through the pipeline's own runtime, and times F, I and
W of every piece on the device (on a CPU with launch.threads threads, 1 if that is 0). Under `torchrun
--nproc-per-node=EP -m training.measure … parallel.ep=EP` experts are spread and the all-to-all is measured too:
`overlap` is then the part of a layer that is not communication. What messages between stages cost (`latency`,
`transfer`) is left at 0; type it in if you know it. `training/work.py` describes the file.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import hydra
import torch.distributed as dist

from dualpipe.clock import Clock, clock_of
from dualpipe.lanes import Mark, RecordingLanes, SerialLanes
from dualpipe.runtime import Runtime
from dualpipe.schedules import make_schedule
from dualpipe.stage import Lane
from dualpipe.wgrad import WeightGradQueue
from model.loss import LossConfig
from model.precisions import make_precision
from parallel.build import build_stages
from training.config import Config, from_hydra, register_schemas
from training.outcome import BAD_CONFIG, end_on_purpose
from training.step import loss_scales
from training.trainer import Job, join_process_group, prepare

MICRO_BATCHES = 4
STEPS = 4  # the first is not counted
Times = dict[tuple[str, str], float]  # (kind, part): seconds per micro-batch

PARTS = {"F": "forward", "I": "inputs", "W": "weights"}


def main(arguments: Sequence[str]) -> int:
    """Measure and write the file. A wrong argument gives one line and status 2."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        out = _out(arguments)
        config = reduced(_compose([a for a in arguments if not a.startswith("out=")]))
        _check_processes(config.parallel.ep, world)
        job = prepare(config, world, trains=False)
    except Exception as error:  # Hydra has many kinds
        if rank == 0:
            cause = "" if error.__cause__ is None else f": {error.__cause__}"
            print(f"error: {' '.join(f'{error}{cause}'.split())}", file=sys.stderr)
        return end_on_purpose(BAD_CONFIG)
    costs = measure(job)
    if rank == 0:
        text = json.dumps(costs, indent=1)
        out.write_text(f"{text}\n", encoding="utf-8")
        print(text)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


def _out(arguments: Sequence[str]) -> Path:
    """Where the file goes."""
    out = [a.removeprefix("out=") for a in arguments if a.startswith("out=")]
    if not out:
        raise ValueError("say where to write the costs: out=costs.json")
    path = Path(out[-1])
    if not path.absolute().parent.is_dir():
        raise ValueError(f"out={path}: there is no such folder")
    if path.is_dir():
        raise ValueError(f"out={path} is a folder; name a file")
    return path


def _check_processes(ep: int, world: int) -> None:
    if ep == world:
        return
    wanted = "without torchrun" if ep == 1 else f"under torchrun --nproc-per-node={ep}"
    raise ValueError(
        f"parallel.ep={ep} is measured by {ep} {'process' if ep == 1 else 'processes'}, but there "
        f"{'is 1' if world == 1 else f'are {world}'}: start it {wanted}, or set parallel.ep={world}"
    )


def reduced(config: Config) -> Config:
    """One stage with one layer of each kind that the model has, on as many processes as share the experts."""
    model = config.model
    dense, moe = min(1, model.num_dense_layers), min(1, model.num_moe_layers)
    return replace(
        config,
        model=replace(model, num_layers=dense + moe, num_dense_layers=dense, mtp_depth=min(1, model.mtp_depth)),
        parallel=replace(config.parallel, pp=1, layers_per_stage=[]),
        schedule=replace(config.schedule, name="zb1p", micro_batches=MICRO_BATCHES, costs=None),
        optim=replace(config.optim, zero=0),
        launch=replace(config.launch, threads=config.launch.threads or 1),
    )


def measure(job: Job) -> dict[str, object]:
    """The costs as the file holds them: medians over the steps, in seconds per micro-batch."""
    mesh, model = join_process_group(job), job.config.model
    queue, clock = WeightGradQueue(), clock_of(job.device)
    precision, _ = make_precision(job.config.precision, compiled=job.config.compile == "on")
    stages = build_stages(model, job.schedule, mesh, precision, job.options, queue)
    lanes = RecordingLanes(SerialLanes(), clock)
    schedule = make_schedule("zb1p", 1, MICRO_BATCHES)
    runtime = Runtime(stages, schedule, 0, None, queue, fill=False, device=job.device, lanes=lanes)
    batch = [mb.to(job.device) for mb in job.batch_plan.batch_at(job.dataset("train"), 0, mesh.dp)]
    scales = loss_scales(batch, model.mtp_depth, LossConfig(), mesh)
    batch = [replace(mb, **scales.fields) for mb in batch]
    compute, communication = [], []
    for _ in range(STEPS):
        lanes.marks.clear()
        runtime.step(batch)
        compute.append(add_up(lanes.marks, Lane.COMPUTE, clock, model.num_dense_layers))
        communication.append(add_up(lanes.marks, Lane.COMM, clock, model.num_dense_layers))
    return {**summary(_medians(compute[1:]), _medians(communication[1:])), "latency": 0.0, "transfer": 0.0}


def add_up(marks: Sequence[Mark], lane: Lane, clock: Clock, num_dense: int) -> Times:
    """Seconds per kind and part: of labels such as `1.experts(F) of 0.3`."""
    times: Times = defaultdict(float)
    for mark in marks:
        if mark.lane is lane:
            name, _, rest = mark.name.partition("(")
            times[kind_of(name, num_dense), PARTS[rest[0]]] += clock.seconds(mark.start, mark.end) / MICRO_BATCHES
    return times


def kind_of(name: str, num_dense: int) -> str:
    """Which kind of layer a segment belongs to, by its name."""
    label = name.split(".")[0]
    if label.isdigit():
        return "dense" if int(label) < num_dense else "moe"
    return label if label in ("mtp", "embedding") else "head"


def _medians(steps: Sequence[Times]) -> Times:
    return {key: statistics.median(step[key] for step in steps) for key in {k for step in steps for k in step}}


def summary(compute: Times, communication: Times) -> dict[str, dict[str, float]]:
    """Work by kind: compute and communication together, and the part of them that is compute."""
    found: dict[str, dict[str, float]] = {}
    for kind in sorted({kind for kind, _ in compute}):
        parts = {part: compute.get((kind, part), 0.0) + communication.get((kind, part), 0.0) for part in PARTS.values()}
        hidden = sum(time for (k, _), time in communication.items() if k == kind)
        whole = sum(parts.values())
        found[kind] = {**parts, "overlap": max(0.5, 1 - hidden / whole) if whole else 1.0}
    return found


def _compose(overrides: Sequence[str]) -> Config:
    register_schemas()
    with hydra.initialize_config_dir(str(Path(__file__).parent.parent / "conf"), version_base="1.3"):
        return from_hydra(hydra.compose("config", list(overrides)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
