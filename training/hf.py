"""To and from the public checkpoint format:

    python -m training.hf export runs/default OUT [--format bf16|fp32|fp8] [--shard-gb 5]
    python -m training.hf config FOLDER

`export` writes the newest checkpoint of a run (or the one that is named) as config.json and shards of safetensors,
one shard in memory at a time. `config` prints the overrides under which train.py can load a public checkpoint:
import is `train.py init_from=FOLDER`, where each rank reads the tensors that it needs, one at a time.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from model.config import ModelConfig
from model.hf import entries
from model.hf_files import PublicCheckpoint, write_checkpoint
from parallel.fragments import Fragment
from parallel.saved import CheckpointError, find_checkpoint, read_fragments, read_run_state


def export(path: Path, out: Path, variant: str, shard_bytes: int) -> list[Path]:
    """Write a checkpoint in the public format. Raises ValueError or CheckpointError."""
    state = read_run_state(path)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), state.config["model"]))
    assert isinstance(config, ModelConfig)
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries(config):
        rows = max(entry.rows.stop, shapes.get(entry.ours, (0,))[0])
        shapes[entry.ours] = (rows, *entry.shape[1:])

    def source(names: Sequence[str]) -> dict[str, Tensor]:
        tensors = {name: torch.empty(shapes[name]) for name in names}
        fragments = [Fragment(name, tuple(t.shape), 0, t.view(-1)) for name, t in tensors.items()]
        read_fragments(path, fragments, None)
        return tensors

    return write_checkpoint(out, config, source, variant, state.config["data"]["seq_len"], shard_bytes)


def overrides(folder: Path) -> list[str]:
    """model.key=value for everything in which a public checkpoint differs from the defaults."""
    config, defaults = PublicCheckpoint(folder).config, ModelConfig()
    return [f"model.{name}={value}" for name, value in vars(config).items() if value != getattr(defaults, name)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training.hf", description=(__doc__ or "").split("\n\n")[-1])
    commands = parser.add_subparsers(dest="command", required=True)
    to_hub = commands.add_parser("export", help="write a checkpoint in the public format")
    to_hub.add_argument("run", type=Path, help="a run's folder, or one of its checkpoints")
    to_hub.add_argument("out", type=Path, help="a new folder")
    to_hub.add_argument("--format", default="bf16", help="bf16, fp32, or fp8")
    to_hub.add_argument("--shard-gb", type=float, default=5.0)
    settings = commands.add_parser("config", help="print the overrides for train.py init_from=FOLDER")
    settings.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        if options.command == "config":
            print(" ".join([*overrides(options.folder), f"init_from={options.folder}"]))
            return 0
        path = find_checkpoint(options.run)
        if path is None:
            raise ValueError(f"{options.run} is neither a checkpoint nor a run with checkpoints")
        if not 0 < options.shard_gb < math.inf:
            raise ValueError(f"--shard-gb {options.shard_gb} must be positive")
        shards = export(path, options.out, options.format, int(options.shard_gb * 1e9))
        print(f"{path} → {options.out}: {len(shards)} shard(s), {options.format}")
    except (ValueError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
