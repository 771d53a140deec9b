"""One micro-batch of packed token sequences, as every stage of the model sees it.

Shape legend, used by all of `model/`:
  B sequences, S positions, T = B·S tokens, D hidden size, V vocabulary.

Every pipeline rank holds the whole micro-batch (it is small: a few integers per token). Middle stages need the
document boundaries for attention and the positions for RoPE, so nothing but activations travels between stages.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

IGNORE = -1  # a target that counts for nothing: the position after a document's end


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences.

    tokens_BS     int64, the input tokens.
    targets_BS    int64, the token to predict at each position, or `IGNORE`.
    documents_BS  int64, the number of the document within its row; attention never crosses it.
    positions_BS  int64, the position inside the document (0 at its first token in this row), for RoPE.
    loss_scale    the loss is the sum over targets times this; one over the targets of the global batch.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    documents_BS: Tensor
    positions_BS: Tensor
    loss_scale: float = 1.0

    @property
    def num_tokens(self) -> int:
        return self.tokens_BS.numel()

    @property
    def num_targets(self) -> int:
        return int((self.targets_BS != IGNORE).sum())

    def to(self, device: torch.device) -> MicroBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "loss_scale"}
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in tensors.items()})
