"""Checkpoints: atomic, checked, every tensor once under its global name, loadable under any layout.

    runs/<run>/checkpoints/step_00000100/
        __0_0.distcp …   tensors of each rank (parallel/fragments.py)      .metadata   where each element is
        run.json         step, data position, configuration, W&B run id    checksums.json, COMPLETE: is it whole?

A checkpoint holds the FP32 master weights and router biases by name, the optimizer's moments as `exp_avg.<name>` …,
the averaged weights as `ema.<name>` if there are any, and each rank's random state. Names say nothing about ranks
(model/names.py), so it loads under any number of processes, schedule, ZeRO stage or precision. On the same layout a
resumed run is bit-equal to one that never stopped; the data position is a number of samples.

`python -m training.checkpoint inspect PATH` prints what is inside.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from parallel.fragments import Fragment, buffer_fragments, optimizer_fragments
from parallel.integrity import check_contents, read_checksums
from parallel.mesh import Mesh
from parallel.saved import CheckpointError, RunState, has_average, read_fragments, read_run_state
from parallel.update import Update


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
    read_fragments(path, [*fragments, mine] if same_world else fragments, mesh.control)
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


if __name__ == "__main__":
    from training.inspect_checkpoint import main

    sys.exit(main())
