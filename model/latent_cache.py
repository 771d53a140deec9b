"""What generation keeps of the tokens that a model has read: per layer one narrow vector, not all keys and values.

Multi-head latent attention needs of an earlier token only its normed key-value latent and its rotated key part that
all heads share (report 2.1.1): key_value_rank + rope_dim values per token and layer, 512 + 64 in DeepSeek-V3.

The cache is a number of *slots*, each with the vectors of one token in all layers. Which slots a sequence uses, and in
which order, is told with every batch, so pages, copies and reuse are the business of whoever hands the slots out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import ModelConfig


class LatentCache:
    """latents [layers, slots, key_value_rank + rope_dim], layers in the order of their labels ("0", …, "mtp.1")."""

    def __init__(
        self, config: ModelConfig, labels: Sequence[str], slots: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.index = {label: i for i, label in enumerate(labels)}
        self.rank = config.key_value_rank
        self.latents = torch.zeros(len(labels), slots, self.rank + config.rope_dim, dtype=dtype, device=device)

    @property
    def slots(self) -> int:
        return self.latents.shape[1]

    @property
    def bytes_per_token(self) -> int:
        return self.latents[:, :1].numel() * self.latents.element_size()

    def write(self, label: str, slots_T: Tensor, latents_TC: Tensor) -> None:
        self.latents[self.index[label]].index_copy_(0, slots_T, latents_TC)

    def read(self, label: str, slots_BL: Tensor) -> Tensor:
        """[B, L, key_value_rank + rope_dim]."""
        layer = self.latents[self.index[label]]
        return layer.index_select(0, slots_BL.flatten()).view(*slots_BL.shape, -1)

    def take(self, slots_N: Tensor) -> Tensor:
        """A copy of everything in some slots: [layers, N, key_value_rank + rope_dim]."""
        return self.latents.index_select(1, slots_N.to(self.latents.device))

    def put(self, slots_N: Tensor, latents_LNC: Tensor) -> None:
        """Fill slots with what another cache of the same layers gave (`take`)."""
        self.latents.index_copy_(1, slots_N.to(self.latents.device), latents_LNC)
