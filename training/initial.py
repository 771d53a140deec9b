"""Where the first weights come from if not from the seed: another run, one of its checkpoints, or a public one.

    train.py init_from=runs/default                         the newest checkpoint of a run
    train.py init_from=runs/default/checkpoints/step_…      this one
    train.py init_from=DeepSeek-V3                          a folder with config.json and safetensors (model/hf.py)

Only weights and router biases are taken; the optimizer, the data and the step begin anew. A run that has checkpoints of
its own goes on from those, so the same command also resumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.hf_files import CONFIG, PublicCheckpoint
from model.names import named_tensors
from model.stage import ModelStage
from parallel.saved import CheckpointError, find_checkpoint, load_weights, read_run_state

# What may differ between the model that was trained and the one that goes on: none of it changes a tensor, and a
# longer context is what a continued run is for.
_MAY_DIFFER = frozenset(
    {"init_std", "recompute", "rope_factor", "rope_original_length", "rope_beta_fast", "rope_beta_slow"}
    | {"rope_mscale", "rope_mscale_all_dim"}
)


def find_weights(init_from: str, model: ModelConfig) -> Path:
    """The folder to load. Raises ValueError if there is none, or its model differs from ours, naming the override."""
    path = Path(init_from)
    if (path / CONFIG).is_file():
        _compare(path, vars(PublicCheckpoint(path).config), model)
        PublicCheckpoint(path).check(model)
        return path
    try:
        found = find_checkpoint(path)
    except CheckpointError as error:
        raise ValueError(f"init_from={init_from}: {error}") from error
    if found is None:
        raise ValueError(
            f"init_from={init_from} is neither a run with checkpoints, nor a checkpoint, nor a folder with {CONFIG}"
        )
    _compare(found, read_run_state(found).config["model"], model)
    return found


def load_initial(path: Path, model: ModelConfig, stages: Mapping[int, ModelStage]) -> None:
    """Fill this rank's stages; each rank reads its own tensors. Raises FormatError or CheckpointError."""
    for stage in stages.values():
        if (path / CONFIG).is_file():
            tensors = {name: tensor.detach() for name, tensor, _ in named_tensors(stage)}
            PublicCheckpoint(path).load_into(model, tensors)
        else:
            load_weights(path, stage)


def _compare(path: Path, theirs: Mapping[str, Any], model: ModelConfig) -> None:
    for name, ours in vars(model).items():
        known = theirs.get(name, getattr(ModelConfig(), name))
        if name not in _MAY_DIFFER and known != ours:
            raise ValueError(f"init_from: {path} holds a model with {name}={known}; set model.{name}={known}")
