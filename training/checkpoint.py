"""Checkpoints: torch.distributed.checkpoint, atomic, every tensor once under its global name.

    runs/<run>/checkpoints/step_00000100/     tensors of all ranks, and run.json: step, config, W&B run id

A checkpoint is written aside as `.writing_…` and renamed when all ranks have finished and everything is on disk, so
a folder called step_… is always whole. Names are global (`model/names.py`), so they say nothing about ranks.

On the same layout a resumed run is bit-equal to one that never stopped: weights, Adam's moments and step count,
router biases and every rank's random state come back; the data position is the step itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from model.names import named_tensors
from parallel.mesh import Mesh

_NAME = re.compile(r"step_(\d{8})")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message says which and why."""


@dataclass(frozen=True)
class RunState:
    """What a run needs besides tensors: steps done, the configuration, the W&B run id, processes.

    expert_loads   router counts by layer since the last evaluation (training/balance.py)
    """

    step: int
    config: dict[str, Any]
    wandb_id: str
    world: int
    expert_loads: dict[str, list[int]] = field(default_factory=dict)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / "run.json").is_file())


def read_run_state(path: Path) -> RunState:
    try:
        return RunState(**json.loads((path / "run.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}/run.json cannot be read: {error}") from error


def init_adam(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its Adam state now, so that there is something to load into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state.update({name: torch.zeros_like(parameter) for name in _MOMENTS})


def tensors_of(stages: Iterable[nn.Module], optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Weights, router biases and Adam's moments by global name; loading into these tensors changes the run itself."""
    tensors: dict[str, Tensor] = {}
    for stage in stages:
        parameters = dict(stage.named_parameters())
        stacked = {local: dict.fromkeys(_MOMENTS, 0) for local in parameters}
        for name, tensor, local in named_tensors(stage):
            tensors[name] = tensor.detach()
            if optimizer is None or local not in parameters:
                continue
            parameter = parameters[local]
            for moment in _MOMENTS:
                values = optimizer.state[parameter][moment]
                if values.shape != tensor.shape:  # a routed expert: one slice of the stacked parameter
                    index = stacked[local][moment]
                    stacked[local][moment] += 1
                    values = values[index]
                tensors[f"{moment}.{name}"] = values
    return tensors


def save(
    folder: Path, state: RunState, stages: Mapping[int, nn.Module], optimizer: torch.optim.Optimizer, mesh: Mesh
) -> Path:
    """Write a checkpoint; collective. Returns its path once it is whole."""
    target = checkpoint_path(folder, state.step)
    writing = folder / f".writing_{target.name}"
    if mesh.rank == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    _barrier(mesh)
    init_adam(optimizer)
    tensors = tensors_of(stages.values(), optimizer)
    tensors["adam_step"] = next(iter(optimizer.state.values()))["step"]
    tensors[f"random_state.{mesh.rank}"] = torch.get_rng_state()
    dcp.save(tensors, checkpoint_id=writing, process_group=mesh.control, no_dist=mesh.control is None)
    if mesh.rank == 0:
        (writing / "run.json").write_text(json.dumps(vars(state), indent=1))
        for file in writing.iterdir():
            _flush(file)
        if target.exists():
            shutil.rmtree(target)
        os.rename(writing, target)
        _flush(folder)
    _barrier(mesh)
    return target


def load(path: Path, stages: Mapping[int, nn.Module], optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
    """Read a checkpoint into the stages and the optimizer; collective."""
    init_adam(optimizer)
    tensors = tensors_of(stages.values(), optimizer)
    adam_step = torch.zeros((), dtype=torch.float32)
    tensors["adam_step"] = adam_step
    random_state = torch.get_rng_state()
    same_world = read_run_state(path).world == mesh.layout.world
    if same_world:
        tensors[f"random_state.{mesh.rank}"] = random_state
    _read(path, tensors, mesh.control)
    for state in optimizer.state.values():
        state["step"].copy_(adam_step)
    if same_world:
        torch.set_rng_state(random_state)


def load_weights(path: Path, stage: nn.Module) -> None:
    """Read weights and router biases into one module, in this process alone."""
    _read(path, tensors_of([stage], None), None)


def prune(folder: Path, keep_last: int) -> None:
    """Delete all but the newest checkpoints, and what a killed save left behind."""
    for old in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    for torn in folder.glob(".writing_*"):
        shutil.rmtree(torn)


def _read(path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    try:
        dcp.load(tensors, checkpoint_id=path, process_group=group, no_dist=group is None)
    except Exception as error:  # DCP raises many kinds; each means that this checkpoint cannot be used
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {error}") from error


def _barrier(mesh: Mesh) -> None:
    if mesh.control is not None:
        dist.barrier(group=mesh.control)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
