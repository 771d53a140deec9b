"""A model ready to be served: the weights, the tokenizer, and the length that it serves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from model.stage import ModelStage
from parallel.whole import load_whole_model
from serving.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class ServedModel:
    """name: the run or folder that it came from. max_length: the longest sequence, prompt and answer."""

    name: str
    stage: ModelStage
    tokenizer: Tokenizer
    max_length: int


def load_served(
    checkpoint: str, precision: str, device: str = "auto", averaged: bool = False, max_length: int = 0
) -> ServedModel:
    """Load a run, a checkpoint or a public folder. max_length 0: as long as it was trained for.

    Raises ValueError or CheckpointError, saying what is wrong.
    """
    check_max_length(max_length)
    where = resolve_device(device)
    path = Path(checkpoint)
    model = load_whole_model(path, precision, where, averaged)
    tokenizer = load_tokenizer(model.folder, model.stage.config)
    return ServedModel(path.resolve().name, model.stage, tokenizer, max_length or model.max_length)


def use_threads(count: int) -> None:
    """On the CPU; 0 = torch's default. Raises ValueError for less."""
    if count < 0:
        raise ValueError(f"threads={count} must be 0 (torch's default) or more")
    if count:
        torch.set_num_threads(count)


def check_max_length(max_length: int) -> None:
    if max_length < 0:
        raise ValueError(f"max_length={max_length} must be 0 (as trained) or more")


def resolve_device(name: str) -> torch.device:
    """auto: the GPU if there is one. Raises ValueError for an unknown name, or cuda without a GPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name!r} is unknown; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but this torch sees no GPU; use device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
