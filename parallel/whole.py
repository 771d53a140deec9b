"""A whole model in one process, from wherever its weights are: a run, one of its checkpoints, or the public format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

import dualpipe.stage as stage_types
from dualpipe.wgrad import WeightGradQueue
from model.config import ModelConfig
from model.hf_files import CONFIG, PublicCheckpoint
from model.init import initialise
from model.layers import Toolbox
from model.names import named_tensors
from model.precisions import make_precision
from model.stage import ModelStage, StageShape
from parallel.dispatch import RoutedDispatcher
from parallel.saved import find_checkpoint, has_average, load_weights, read_run_state


@dataclass(frozen=True)
class FoundModel:
    """What a folder says of its model, before any weight is read. max_length: the longest sequence of its training."""

    folder: Path
    config: ModelConfig
    max_length: int
    is_public: bool


@dataclass(frozen=True)
class WholeModel:
    """folder: what was loaded. max_length: the longest sequence that the model was trained for."""

    stage: ModelStage
    folder: Path
    max_length: int


def find_model(path: Path, averaged: bool = False) -> FoundModel:
    """A run's newest checkpoint, a checkpoint, or a folder in the public format (config.json and safetensors).

    averaged   whether the moving average of the weights (optim.ema) is wanted
    Raises ValueError (also as FormatError) or CheckpointError, saying what is wrong with the folder.
    """
    if (path / CONFIG).is_file():
        if averaged:
            raise ValueError(f"{path} is in the public format, which holds no average of the weights; leave ema out")
        settings: dict[str, Any] = json.loads((path / CONFIG).read_text())
        length = int(settings.get("max_position_embeddings", 4096))
        return FoundModel(path, PublicCheckpoint(path).config, length, is_public=True)
    folder = find_checkpoint(path)
    if folder is None:
        raise ValueError(f"{path} is neither a run with checkpoints, nor a checkpoint, nor a folder with {CONFIG}")
    state = read_run_state(folder)
    if averaged and not has_average(state):
        raise ValueError(f"{folder} holds no average of the weights (it was trained without optim.ema)")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), state.config["model"]))
    assert isinstance(config, ModelConfig)
    return FoundModel(folder, config, int(state.config["data"]["seq_len"]), is_public=False)


def load_whole_model(
    path: Path,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    averaged: bool = False,
    cpp: bool = False,
) -> WholeModel:
    """Find a model (see `find_model`) and load its weights, or the average of them. cpp: as of `empty_model`."""
    found = find_model(path, averaged)
    stage = empty_model(found.config, precision, device, cpp=cpp)
    load_into(found, stage, averaged)
    return WholeModel(stage, found.folder, found.max_length)


def load_into(found: FoundModel, stage: ModelStage, averaged: bool = False) -> None:
    """Read the weights of a stage, and only those, into it."""
    if found.is_public:
        tensors = {name: tensor.detach() for name, tensor, _ in named_tensors(stage)}
        PublicCheckpoint(found.folder).load_into(found.config, tensors)
    else:
        load_weights(found.folder, stage, averaged)


def empty_model(
    config: ModelConfig,
    precision: str,
    device: str | torch.device = "cpu",
    seed: int = 0,
    with_experts: bool = True,
    cpp: bool = False,
) -> ModelStage:
    """The whole model as one stage with its initial weights. Raises ValueError for an unknown precision.

    with_experts   whether it has the routed experts; else its layers have none, for somebody who brings his own
    cpp            generation uses our C++ kernels where they fit (model/cpu)
    """
    config.check()
    seam, dtype = make_precision(precision)
    tools = Toolbox(seam, WeightGradQueue(), RoutedDispatcher(None, config.num_experts), dtype, device, cpp=cpp)
    experts = range(config.num_experts if with_experts else 0)
    stage = ModelStage(config, StageShape(range(config.num_layers), experts, True, True), tools, stage_types)
    initialise(stage, seed, config.init_std)
    return stage
