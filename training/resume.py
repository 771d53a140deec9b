"""Where does a run start? At its newest sound checkpoint, if that belongs to the same experiment.

The layout may change between the two, names are global. What may not change under a run's feet is what it learns
and from what: the model, the text, its order, and the size of the global batch, on which the data position rests.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from parallel.mesh import Layout
from parallel.saved import CheckpointError, all_checkpoints, problem_of, read_run_state
from training.config import Config, to_dict

_FIXED = (
    *("model", "seed", "optim.name", "data.path", "data.seq_len", "data.val_fraction"),
    *("recipe.batch_start", "recipe.batch_increment", "recipe.batch_tokens", "recipe.token_scale"),
)


def find_resume_point(config: Config, layout: Layout) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start.

    Raises ValueError if the run's checkpoints belong to a different experiment, or exist although resume=never (those
    that it made itself before torchrun started its ranks again do not count), and CheckpointError if there are some
    but none is usable.
    """
    folder = Path(config.runs_dir) / config.run / "checkpoints"
    found = all_checkpoints(folder)
    if not found:
        return None
    if config.resume == "never" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        raise ValueError(
            f"{config.runs_dir}/{config.run} already has checkpoints; choose another run=NAME, or resume=auto to go on"
        )
    newest = newest_sound(found)
    state = read_run_state(newest)
    ours = to_dict(config)
    for key in _FIXED:
        before, now = lookup(state.config, key), lookup(ours, key)
        if key == "model":  # how it is computed may change
            before, now = ({k: v for k, v in side.items() if k != "recompute"} for side in (before, now))
        if before != now:
            difference = _difference(key, before, now)
            raise ValueError(f"{newest} was trained with {difference}; go back to that, or choose another run=NAME")
    before, now = global_batch(state.config, state.world), global_batch(ours, layout.world)
    if before != now:
        raise ValueError(
            f"{newest} was trained with {before} sequences per step, this run would use {now}; make "
            f"schedule.micro_batches × data.micro_batch_size × data-parallel ranks {before}, or choose another run=NAME"
        )
    return newest


def newest_sound(found: list[Path]) -> Path:
    """The newest of these checkpoints (oldest first) that looks whole; says on rank 0 which ones do not, and why.

    Raises CheckpointError if none does. Looks at names and sizes only; contents are compared when it is loaded.
    """
    for path in reversed(found):
        problem = problem_of(path)
        if problem is None:
            return path
        if os.environ.get("RANK", "0") == "0":
            print(f"checkpoint {path} is skipped: {problem}", file=sys.stderr, flush=True)
    raise CheckpointError(
        f"no checkpoint in {found[0].parent} can be used; move that folder away to start afresh, or choose another "
        f"run=NAME"
    )


def global_batch(config: dict[str, Any], world: int) -> int:
    """Sequences per step."""
    pipelines = world // config["parallel"]["pp"]
    return pipelines * config["schedule"]["micro_batches"] * config["data"]["micro_batch_size"]


def lookup(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _difference(key: str, before: Any, now: Any) -> str:
    """`model.hidden_size=128 (now 256)`, for the first value that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                return _difference(f"{key}.{name}", before.get(name), now.get(name))
    return f"{key}={before} (now {now})"
