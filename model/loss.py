"""Cross entropy over the vocabulary, in FP32 or better."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import IGNORE


def token_loss(logits_TV: Tensor, targets_T: Tensor, scale: float) -> Tensor:
    """scale · Σ −log p(target), over targets that are not IGNORE.

    With scale = 1 / (targets in the global batch), the sum over all micro-batches and ranks is the mean loss, and
    gradients need to be added, never averaged, whatever the layout.
    """
    high = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(high), targets_T, ignore_index=IGNORE, reduction="sum") * scale
