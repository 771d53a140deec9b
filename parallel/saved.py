"""A checkpoint of a run, found and read: what is in the folder `runs/<run>/checkpoints/step_NNNNNNNN`.

`training/checkpoint.py` describes the format and writes it. Here is what anybody needs who only wants the weights, in
one process and without an optimizer: the names of the folders, what run.json says, the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from parallel.fragments import Fragment, load_fragments, module_fragments
from parallel.integrity import read_checksums

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


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that a path names, or the newest whole one of the run that it names; None if it names neither.

    Raises CheckpointError for a checkpoint that is not whole.
    """
    if (path / "run.json").is_file():
        problem = problem_of(path)
        if problem is not None:
            raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
        return path
    return next(reversed(list_checkpoints(path / "checkpoints")), None)


def read_run_state(path: Path) -> RunState:
    try:
        return RunState(**json.loads((path / "run.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}/run.json cannot be read: {error}") from error


def has_average(state: RunState) -> bool:
    """Whether the checkpoint of this state has an average of the weights."""
    return bool(state.config.get("optim", {}).get("ema", 0.0))


def load_weights(path: Path, stage: nn.Module, averaged: bool = False) -> None:
    """Read weights (`averaged`: their moving average) and router biases into one module, in this process alone."""
    read_fragments(path, list(module_fragments(stage, "ema." if averaged else "")), None)


def read_fragments(path: Path, fragments: Sequence[Fragment], group: dist.ProcessGroup | None) -> None:
    """Fill fragments from a checkpoint; collective over `group`. Raises CheckpointError if it cannot."""
    try:
        load_fragments(path, fragments, group)
    except Exception as error:  # DCP raises many kinds; each means that this checkpoint cannot be used here
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {error}") from error
