"""Muon for the hidden matrices, AdamW for the rest (embedding, output head, norms).

    momentum ← μ · momentum + gradient
    update    = orthogonalise(gradient + μ · momentum)            (Nesterov)
    weight   ← weight · (1 − rate · decay) − rate · 0.2 · √max(rows, columns) · update

Orthogonalising replaces the singular values of a matrix by about one, with five Newton-Schulz iterations (Jordan et
al., 2024). The factor makes updates as large as AdamW's, so both share one learning rate and decay (Liu et al., 2025,
arXiv 2502.16982, 2.2). A routed expert is a matrix of its own.

Under ZeRO-1 a rank holds a slice of a bucket, and an update needs whole matrices: the slices are gathered, each rank
orthogonalises those matrices that it holds a part of, and keeps its part.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.buckets import GradBucket
from parallel.update import ParamGroup
from training.adamw import LowPrecisionAdamW

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(LowPrecisionAdamW):
    """Moments of the AdamW part are of type `moments`; Muon's momentum is FP32."""

    def __init__(
        self, groups: list[ParamGroup], betas: tuple[float, float], eps: float, seed: int, moments: torch.dtype,
        momentum: float,
    ) -> None:  # fmt: skip
        super().__init__(groups, betas, eps, seed, moments)
        self.momentum = momentum

    def init_state(self) -> None:
        super().init_state()
        for group in self.param_groups:
            if group["bucket"].hidden:
                for flat in group["params"]:
                    momentum = torch.zeros_like(flat, requires_grad=False)
                    self.state[flat] = {"step": torch.zeros(()), "momentum": momentum}

    @torch.no_grad()
    def step_group(self, group: ParamGroup) -> None:
        if not group["bucket"].hidden:
            super().step_group(group)
            return
        for flat in group["params"]:
            state = self.state[flat]
            state["step"] += 1
            state["momentum"].mul_(self.momentum).add_(flat.grad)
            direction = flat.grad.add(state["momentum"], alpha=self.momentum)
            flat.mul_(1 - group["lr"] * group["weight_decay"])
            flat.add_(orthogonal_part(group["bucket"], direction), alpha=-group["lr"])


def orthogonal_part(bucket: GradBucket, mine: Tensor) -> Tensor:
    """The scaled orthogonal updates, for the slice of the bucket that `mine` is: this rank's share, or all of it."""
    held, whole = slice(0, bucket.grads.numel()), mine
    if mine.numel() < bucket.grads.numel():
        held, whole = bucket.share, torch.empty_like(bucket.grads)
        dist.all_gather_single(whole, mine, group=bucket.group)
    out = torch.zeros_like(mine)
    for piece in bucket.pieces:
        first, last = max(held.start, piece.start), min(held.stop, piece.start + piece.numel)
        if first < last:
            matrix = whole[piece.start : piece.start + piece.numel].view(piece.shape)
            update = orthogonalise(matrix).mul_(0.2 * math.sqrt(max(piece.shape)))
            out[first - held.start : last - held.start] = update.flatten()[first - piece.start : last - piece.start]
    return out


def orthogonalise(matrix: Tensor) -> Tensor:
    """A matrix with the same singular vectors and singular values of about one (0.7 to 1.2); zero stays zero."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.t() if tall else x).contiguous()
