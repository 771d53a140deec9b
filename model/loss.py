"""Cross entropy over the vocabulary, in FP32 or better, and the optional z-loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import IGNORE


@dataclass
class LossConfig:
    """Weights of the terms beside the main loss; 0 leaves a term out, and its computation."""

    mtp_weight: float = 0.3  # λ of multi-token prediction, shared out evenly among its depths (report 2.2)
    z_weight: float = 0.0  # of the mean squared log-normaliser of the logits

    def check(self) -> None:
        """Raise ValueError, naming the override, for weights that make no sense."""
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"loss.{name}={value} must be 0 or more")


def token_loss(logits_TV: Tensor, targets_T: Tensor, scale: float) -> Tensor:
    """scale · Σ −log p(target), over targets that are not IGNORE.

    With scale = 1 / (targets in the global batch), the sum over all micro-batches and ranks is the mean loss, and
    gradients need to be added, never averaged, whatever the layout.
    """
    high = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(high), targets_T, ignore_index=IGNORE, reduction="sum") * scale


def squared_normaliser(logits_TV: Tensor, targets_T: Tensor, scale: float) -> Tensor:
    """The z-loss: scale · Σ (log Σ exp logits)², over positions with a target. Keeps the logits from drifting."""
    high = torch.promote_types(logits_TV.dtype, torch.float32)
    z_T = logits_TV.to(high).logsumexp(-1)
    return z_T.square().where(targets_T != IGNORE, 0).sum() * scale
