"""The small functions of the model that have a hand-written backward: embedding, RMSNorm, SwiGLU.

Their own autograd functions keep less than autograd would (RMSNorm and SwiGLU keep their inputs and recompute the
rest, as in the report's section 3.2.3), and put parameter gradients where the precision seam puts them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.precision import grad_of
from model.protocols import WeightGrads


def embed(tokens: Tensor, weight_VD: nn.Parameter, dtype: torch.dtype, queue: WeightGrads) -> Tensor:
    """Rows of the embedding table, in `dtype`: tokens [...] → [..., D]."""
    return _Embed.apply(tokens, weight_VD, dtype, queue)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: nn.Parameter, dtype: torch.dtype, queue: WeightGrads) -> Tensor:
        ctx.tokens, ctx.weight, ctx.queue = tokens, weight, queue
        return F.embedding(tokens, weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        tokens, weight = ctx.tokens.reshape(-1), ctx.weight
        rows = dy.reshape(-1, dy.shape[-1])
        ctx.queue.put(lambda: grad_of(weight).index_add_(0, tokens, rows.to(grad_of(weight).dtype)))
        return None, None, None, None


def rms_norm(x: Tensor, weight_D: nn.Parameter, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension, computed in at least FP32, returned in x's dtype."""
    return _RMSNorm.apply(x, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, eps: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.eps = weight, eps
        high = x.to(weight.dtype)
        return (high * _inverse_rms(high, eps) * weight.detach()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weight = ctx.weight
        high, dy_high = x.to(weight.dtype), dy.to(weight.dtype)
        inverse = _inverse_rms(high, ctx.eps)
        normed = high * inverse
        # The weight's gradient is a sum over tokens that needs `normed`; keeping that for W would cost more
        # than the sum itself, so it is added here.
        grad_of(weight).add_((dy_high * normed).flatten(0, -2).sum(0))
        dnormed = dy_high * weight.detach()
        dx = inverse * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
        return dx.to(x.dtype), None, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def swiglu(gate_up: Tensor, gates_R: Tensor | None = None) -> Tensor:
    """silu(gate) · up [· router gate per row]: [..., 2F] → [..., F]. Keeps only its inputs."""
    return _SwiGLU.apply(gate_up, gates_R)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, gates_R: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, gates_R)
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = F.silu(gate) * up
        return hidden if gates_R is None else hidden * gates_R.unsqueeze(-1).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, gates_R = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        torch.mul(dy, F.silu(gate), out=dup)
        dsilu = dy * up
        dgates = None
        if gates_R is not None:
            dgates = torch.linalg.vecdot(dup, up).to(gates_R.dtype)
            weights_R1 = gates_R.unsqueeze(-1).to(dy.dtype)
            dup *= weights_R1
            dsilu *= weights_R1
        torch.ops.aten.silu_backward.grad_input(dsilu, gate, grad_input=dgate)
        return dgate_up, dgates
