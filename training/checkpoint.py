"""Checkpoints: atomic, checked, every tensor once under its global name, loadable under any layout.

    runs/<run>/checkpoints/step_00000100/
        __0_0.distcp …   tensors of each rank (parallel/fragments.py)      .metadata   where each element is
        run.json         step, data position, configuration, W&B run id    checksums.json, COMPLETE (integrity.py)

A checkpoint holds the FP32 master weights and router biases by name, the optimizer's moments as `exp_avg.<name>` …,
the averaged weights as `ema.<name>` if there are any, and each rank's random state. Names say nothing about ranks
(model/names.py), so it loads under any number of processes, schedule, ZeRO stage or precision. On the same layout a
resumed run is bit-equal to one that never stopped; the data position is a number of samples.

`python -m training.checkpoint inspect PATH` prints what is inside.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.fragments import Fragment, buffer_fragments, load_fragments, module_fragments, optimizer_fragments
from parallel.mesh import Mesh
from parallel.update import Update
from training.integrity import check_contents, read_checksums

_NAME = re.compile(r"step_(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used or written; the message says which and why."""


@dataclass(frozen=True)
class RunState:
    """What a run needs besides tensors.

    step           optimizer steps asked for so far
    samples        sequences read so far: the data position
    tokens         tokens trained on so far: the clock of the recipe
    updates        steps that changed the weights (a step with a gradient that is not finite does not)
    world          processes that wrote it
    recent_norms   gradient norms by which the next one is judged (training/guard.py)
    expert_loads   router counts by layer since the last evaluation (training/balance.py)
    """

    step: int
    samples: int
    tokens: int
    updates: int
    config: dict[str, Any]
    wandb_id: str
    world: int
    expert_loads: dict[str, list[int]] = field(default_factory=dict)
    recent_norms: list[float] = field(default_factory=list)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not called step_NNNNNNNN like a checkpoint")
    return int(match[1])


def all_checkpoints(folder: Path) -> list[Path]:
    """Everything that calls itself a checkpoint, oldest first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=step_of)


def problem_of(path: Path) -> str | None:
    """Why a checkpoint cannot be used, as far as can be seen without reading its contents; None if it can."""
    try:
        read_checksums(path)
        read_run_state(path)
    except (ValueError, CheckpointError) as error:
        return str(error)
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were finished and have all their files, oldest first."""
    return [p for p in all_checkpoints(folder) if problem_of(p) is None]


def read_run_state(path: Path) -> RunState:
    try:
        return RunState(**json.loads((path / "run.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}/run.json cannot be read: {error}") from error


def has_average(state: RunState) -> bool:
    """Whether the checkpoint of this state has an average of the weights."""
    return bool(state.config.get("optim", {}).get("ema", 0.0))


def run_fragments(stages: Mapping[int, nn.Module], update: Update, mesh: Mesh, owned: bool) -> Iterator[Fragment]:
    """All tensors of a run on this rank; `owned`: only those that it saves."""
    yield from optimizer_fragments(update.shards, owned)
    yield from buffer_fragments(stages, mesh, owned)


def random_state(rank: int) -> Fragment:
    state = torch.get_rng_state()
    return Fragment(f"random_state.{rank}", tuple(state.shape), 0, state)


def load(
    path: Path,
    stages: Mapping[int, nn.Module],
    update: Update,
    mesh: Mesh,
    average: Sequence[Fragment] = (),
    random_states: bool = True,
) -> RunState:
    """Read a checkpoint into the stages and the optimizer; collective. Raises CheckpointError, alike on all ranks.

    The average of the weights is read if there is one in it (`has_average`), random states if as many processes as now
    wrote them, unless `random_states` is False.
    """
    verify_contents(path, mesh)
    state = read_run_state(path)
    fragments = [*run_fragments(stages, update, mesh, owned=False), *(average if has_average(state) else ())]
    mine = random_state(mesh.rank)
    same_world = random_states and state.world == mesh.layout.world
    _read(path, [*fragments, mine] if same_world else fragments, mesh.control)
    update.restore_counters(state.updates)
    update.publish()
    if same_world:
        torch.set_rng_state(mine.values)
    return state


def load_newest(
    candidates: Sequence[Path],
    stages: Mapping[int, nn.Module],
    update: Update,
    mesh: Mesh,
    average: Sequence[Fragment] = (),
) -> tuple[Path, RunState]:
    """Load the newest of these checkpoints (oldest first) that is sound, and say so for each that is not; collective.

    Raises CheckpointError if none is.
    """
    for path in reversed(candidates):
        try:
            return path, load(path, stages, update, mesh, average)
        except CorruptCheckpointError as error:
            if mesh.rank == 0:
                print(f"{error}\nGoing on from the checkpoint before it.", file=sys.stderr, flush=True)
    raise CheckpointError(f"none of the checkpoints can be used: {', '.join(str(p) for p in candidates)}")


class CorruptCheckpointError(CheckpointError):
    """Files of a checkpoint have changed since they were saved."""


def verify_contents(path: Path, mesh: Mesh) -> None:
    """Compare the checksums of all files, each rank its part; collective, with one verdict for all."""
    problem = None
    try:
        entries = read_checksums(path)
        check_contents(path, entries, sorted(entries)[mesh.rank :: mesh.layout.world])
    except (ValueError, OSError) as error:
        problem = str(error)
    problems = [problem]
    if mesh.control is not None:
        problems = [None] * mesh.layout.world
        dist.all_gather_object(problems, problem, group=mesh.control)
    found = [p for p in problems if p is not None]
    if found:
        raise CorruptCheckpointError(f"checkpoint {path} is corrupt: {found[0]}")


def load_weights(path: Path, stage: nn.Module, averaged: bool = False) -> None:
    """Read weights (`averaged`: their moving average) and router biases into one module, in this process alone."""
    _read(path, list(module_fragments(stage, "ema." if averaged else "")), None)


def _read(path: Path, fragments: list[Fragment], group: dist.ProcessGroup | None) -> None:
    try:
        load_fragments(path, fragments, group)
    except Exception as error:  # DCP raises many kinds; each means that this checkpoint cannot be used here
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {error}") from error


if __name__ == "__main__":
    from training.inspect_checkpoint import main

    sys.exit(main())
