"""`python -m training.checkpoint inspect PATH`: what is in a checkpoint, and is it sound?"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch

from parallel.fragments import SavedTensor, saved_tensors
from parallel.integrity import check_contents, read_checksums
from parallel.saved import all_checkpoints, problem_of, read_run_state

KINDS = {"exp_avg": "first moments", "exp_avg_sq": "second moments", "momentum": "Muon momentum",
         "ema": "averaged weights", "random_state": "random states"}  # fmt: skip


def describe(path: Path, contents: bool = True) -> str:
    """Everything worth knowing as text. Raises ValueError, saying why, if the checkpoint is damaged."""
    entries = read_checksums(path)
    if contents:
        check_contents(path, entries, entries)
    state = read_run_state(path)
    tensors = saved_tensors(path)
    size = sum(int(entry["bytes"]) for entry in entries.values())
    parallel = state.config.get("parallel", {})
    optim = state.config.get("optim", {})
    lines = [
        f"checkpoint   {path}",
        f"step         {state.step} ({state.updates} updates, {state.samples} samples, {state.tokens} tokens)",
        f"written by   {state.world} processes, schedule {state.config.get('schedule', {}).get('name')}, "
        f"PP {parallel.get('pp')}, EP {parallel.get('ep')}, ZeRO {optim.get('zero', 0)}, "
        f"precision {state.config.get('precision', {}).get('name')}",
        f"files        {len(entries)}, {size / 1e6:.1f} MB, {'checksums match' if contents else 'sizes match'}",
        "",
        f"{'kind':20}{'tensors':>10}{'elements':>16}{'MB':>12}  types",
    ]
    for kind, members in by_kind(tensors).items():
        elements = sum(torch.Size(t.shape).numel() for t in members)
        megabytes = sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in members) / 1e6
        types = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in members}))
        lines.append(f"{kind:20}{len(members):>10}{elements:>16,}{megabytes:>12.2f}  {types}")
    return "\n".join(lines)


def by_kind(tensors: dict[str, SavedTensor]) -> dict[str, list[SavedTensor]]:
    """Tensors by what they are, from the prefix of their names."""
    kinds: dict[str, list[SavedTensor]] = {"weights": [], "router biases": []}
    for name, tensor in tensors.items():
        kind = KINDS.get(name.split(".")[0]) or ("router biases" if name.endswith("bias_E") else "weights")
        kinds.setdefault(kind, []).append(tensor)
    return {kind: members for kind, members in kinds.items() if members}


def tensor_table(tensors: dict[str, SavedTensor]) -> str:
    """One line per tensor: name, shape, type, chunks."""
    width = max(len(name) for name in tensors)
    lines = [
        f"{name:{width}}  {t.shape!s:20}  {str(t.dtype).removeprefix('torch.'):10}  {t.chunks} chunks"
        for name, t in sorted(tensors.items())
    ]
    counts = Counter(t.chunks for t in tensors.values())
    return "\n".join([*lines, f"chunks per tensor: {dict(sorted(counts.items()))}"])


def resolve(path: Path) -> Path:
    """A checkpoint, or the newest one of a run's folder. Raises ValueError if there is none."""
    for folder in (path, path / "checkpoints"):
        found = all_checkpoints(folder)
        if found:
            return next((p for p in reversed(found) if problem_of(p) is None), found[-1])
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.checkpoint")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="print what is inside and whether it is sound")
    inspect.add_argument("path", type=Path, help="a checkpoint, or a run's folder for its newest one")
    inspect.add_argument("--tensors", action="store_true", help="also every tensor")
    inspect.add_argument("--fast", action="store_true", help="do not read the contents: compare only sizes")
    options = parser.parse_args(arguments)
    try:
        path = resolve(options.path)
        print(describe(path, contents=not options.fast))
        if options.tensors:
            print(f"\n{tensor_table(saved_tensors(path))}")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {options.path}: {error}")
        return 1
    return 0
