"""Where the weights of experts come from, matrix by matrix: a rank reads what it needs, and may come again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from model.hf import entries
from model.hf_files import PublicCheckpoint
from model.names import named_tensors
from model.stage import ModelStage
from parallel.fragments import whole
from parallel.saved import read_fragments
from parallel.whole import FoundModel

Source = Callable[[Mapping[str, Tensor]], None]  # fills matrices of experts, by their global names


def checkpoint_source(found: FoundModel, averaged: bool = False) -> Source:
    """Weights of a folder. averaged: their moving average (see parallel/saved.py).

    Raises FormatError or CheckpointError, now or when it is read.
    """
    prefix = "ema." if averaged else ""
    if not found.is_public:

        def read(tensors: Mapping[str, Tensor]) -> None:
            read_fragments(found.folder, [whole(prefix + name, tensor) for name, tensor in tensors.items()], None)

        return read
    checkpoint = PublicCheckpoint(found.folder)
    checkpoint.check(found.config)
    known = entries(found.config)

    @torch.no_grad()
    def read_public(tensors: Mapping[str, Tensor]) -> None:
        for entry, value in checkpoint.read([e for e in known if e.ours in tensors and not e.is_copy]):
            tensors[entry.ours][entry.rows].copy_(value)

    return read_public


def stage_source(model: ModelStage) -> Source:
    """Weights of a whole model in memory."""
    held = {name: tensor.detach() for name, tensor, _ in named_tensors(model)}

    @torch.no_grad()
    def read(tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(held[name])

    return read
