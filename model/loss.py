"""Cross entropy over the vocabulary and the optional z-loss, in FP32 or better, without all logits of a long sequence.

The logits of many tokens would be the largest tensor of a training step. Two things keep them small:

- up to `MAX_LOGITS` of them, the logits are overwritten, a few rows at a time, by their own gradient, in the dtype in
  which they came; the FP32 copies are only ever of those few rows;
- beyond, the tokens go through the head in chunks, and backward computes each chunk's logits a second time. The
  head's weight gradient is then added at once: putting it off would keep all the logits' gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import IGNORE
from model.cpu.kernels import kernels, suits

MAX_LOGITS = 1 << 26  # tokens × vocabulary that may live at once
_ROWS = 128  # of which FP32 copies exist at once

Head = Callable[[Tensor, bool], Tensor]


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


def head_loss(
    hidden_TD: Tensor,
    head: Head,
    vocab_size: int,
    targets_T: Tensor,
    scale: float,
    z_scale: float = 0.0,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """(scale · Σ −log p(target), z_scale · Σ (log Σ exp logits)²), both over targets that are not IGNORE.

    head   from hidden states [T, D] to logits [T, vocabulary]; its second argument says whether its weight
           gradient may be put off.
    compiled   the logits' loss and gradient by our C++ kernel, where it takes them

    With scale = 1 / (targets in the global batch), the sum over all micro-batches and ranks is the mean loss, and
    gradients need to be added, never averaged, whatever the layout.
    """
    chunk = max(1, MAX_LOGITS // vocab_size)
    if len(hidden_TD) <= chunk:
        losses = _TokenLoss.apply(head(hidden_TD, True), targets_T, scale, z_scale, compiled)
    else:
        parts = zip(hidden_TD.split(chunk), targets_T.split(chunk), strict=True)
        terms = [_Chunk.apply(h, head, targets, scale, z_scale, compiled) for h, targets in parts]
        losses = torch.stack(terms).sum(0)
    return losses[0], losses[1]


class _Chunk(torch.autograd.Function):
    """Logits and loss of one chunk; only the hidden states are kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, targets: Tensor, scale: float, z_scale: float, compiled: bool
    ) -> Tensor:
        ctx.save_for_backward(hidden, targets)
        ctx.head, ctx.options = head, (scale, z_scale, compiled)
        return _TokenLoss.apply(head(hidden, False), targets, *ctx.options)

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets = ctx.saved_tensors
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            losses = _TokenLoss.apply(ctx.head(leaf, False), targets, *ctx.options)
        torch.autograd.backward(losses, dlosses)
        return leaf.grad, None, None, None, None, None


class _TokenLoss(torch.autograd.Function):
    """Both losses of logits [T, V] as one tensor [2]. Takes the logits over: afterwards they are p − onehot(target)."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, scale: float, z_scale: float, compiled: bool) -> Tensor:
        logits_TV = logits_TV.detach()
        high = torch.promote_types(logits_TV.dtype, torch.float32)
        wanted_T = targets_T != IGNORE
        index_T1 = targets_T.where(wanted_T, 0).unsqueeze(1)
        losses = torch.zeros(2, dtype=high, device=logits_TV.device)
        make = _losses_in_cpp if compiled and suits(logits_TV) and logits_TV.is_contiguous() else _losses
        loss_T, z_T = make(logits_TV, index_T1)
        losses[0] = loss_T.where(wanted_T, 0).sum()
        if z_scale:
            losses[1] = z_T.square().where(wanted_T, 0).sum()
        ctx.save_for_backward(logits_TV, index_T1, wanted_T, z_T)
        ctx.scales = (scale, z_scale)
        return losses * torch.tensor([scale, z_scale], dtype=high, device=losses.device)

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        dlogits_TV, index_T1, wanted_T, z_T = ctx.saved_tensors
        scale, z_scale = ctx.scales
        of_p_T = (dlosses[0] * scale).expand(len(dlogits_TV))
        if z_scale:  # of z² = (log Σ exp)²: 2·z·p, and p is what is stored plus onehot(target)
            of_z_T = 2 * z_scale * dlosses[1] * z_T
            of_p_T = of_p_T + of_z_T
        of_p_T1 = of_p_T.where(wanted_T, 0).unsqueeze(1).to(dlogits_TV.dtype)
        dlogits_TV.mul_(of_p_T1)
        if z_scale:
            dlogits_TV.scatter_add_(1, index_T1, of_z_T.where(wanted_T, 0).unsqueeze(1).to(dlogits_TV.dtype))
        return dlogits_TV, None, None, None, None


def _losses(logits_TV: Tensor, index_T1: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces the logits by p − onehot(index); (−log p(index), log Σ exp logits), each [T] and in FP32 or better."""
    high = torch.promote_types(logits_TV.dtype, torch.float32)
    loss_T, z_T = (torch.empty(len(logits_TV), dtype=high, device=logits_TV.device) for _ in range(2))
    for start in range(0, len(logits_TV), _ROWS):
        rows = slice(start, start + _ROWS)
        log_p = F.log_softmax(logits_TV[rows], dim=-1, dtype=high)
        z_T[rows] = logits_TV[rows, 0].to(high) - log_p[:, 0]
        loss_T[rows] = -log_p.gather(1, index_T1[rows]).squeeze(1)
        p = log_p.exp_()
        p.scatter_add_(1, index_T1[rows], torch.full_like(index_T1[rows], -1, dtype=high))
        logits_TV[rows] = p
    return loss_T, z_T


def _losses_in_cpp(logits_TV: Tensor, index_T1: Tensor) -> tuple[Tensor, Tensor]:
    loss_T, z_T = kernels().token_losses(logits_TV, index_T1.squeeze(1))
    return loss_T, z_T
