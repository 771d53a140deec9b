"""One micro-batch of packed token sequences, as every stage of the model sees it.

Shape legend, used by all of `model/`:
  B sequences, S positions, T = B·S tokens, D hidden size, V vocabulary.

Every pipeline rank holds the whole micro-batch (it is small: a few integers per token). Middle stages need the
document boundaries for attention and the positions for RoPE, so nothing but activations travels between stages.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

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
    mtp_scales    the same for each depth of multi-token prediction, its weight included; () leaves MTP out.
    z_scale       the same for the z-loss (model/loss.py), its weight included; 0 leaves it out.
    sequence_scale  one over the sequences of the global batch, for the balance losses; 0 leaves them out.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    documents_BS: Tensor
    positions_BS: Tensor
    loss_scale: float = 1.0
    mtp_scales: tuple[float, ...] = ()
    z_scale: float = 0.0
    sequence_scale: float = 0.0

    @property
    def num_targets(self) -> int:
        return int((self.targets_BS != IGNORE).sum())

    def ahead(self, depth: int) -> tuple[Tensor, Tensor]:
        """What MTP module `depth` sees at position i: token i+depth, and its target, token i+depth+1. Each [B, S].

        Where these leave the document or the row, the target is `IGNORE` and the token has no meaning: nothing that
        counts can attend to such a position, because all later positions of the document are of the same kind.
        """
        same_BS = self.documents_BS[:, depth:] == self.documents_BS[:, :-depth]
        targets_BS = torch.full_like(self.targets_BS, IGNORE)
        targets_BS[:, :-depth] = self.targets_BS[:, depth:].where(same_BS, IGNORE)
        return self.tokens_BS.roll(-depth, dims=1), targets_BS

    def target_counts(self, depth: int) -> list[int]:
        """The number of targets of the main model, and of the MTP modules 1…depth."""
        counts = [int((self.ahead(k)[1] != IGNORE).sum()) for k in range(1, depth + 1)]
        return [self.num_targets, *counts]

    def to(self, device: torch.device) -> MicroBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)
