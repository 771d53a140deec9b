"""The small functions of the model that have a hand-written backward: embedding, RMSNorm, SwiGLU.

Their own autograd functions keep less than autograd would (RMSNorm and SwiGLU keep their inputs and recompute the
rest, as in the report's section 3.2.3), and put parameter gradients where the precision seam puts them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cpu.kernels import kernels as cpp_kernels
from model.cpu.kernels import suits
from model.grads import grad_of
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


@dataclass(frozen=True)
class Kernels:
    """The arithmetic of the small functions, as pure functions of tensors: as written, or compiled."""

    norm: Callable[..., Tensor]
    norm_backward: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[..., Tensor]
    swiglu_backward: Callable[..., tuple[Tensor, Tensor | None]]


@cache
def make_kernels(compiled: bool, cpp: bool = False) -> Kernels:
    """compiled: one pass over memory each. By our C++ kernels, where they take what comes; else by torch.compile, which
    takes some seconds when first called.

    cpp   by our C++ kernels, where they take what comes; else as written
    """

    def made(function: Any) -> Any:
        return torch.compile(function, dynamic=True) if compiled else function

    plain = Kernels(made(_norm), made(_norm_backward), made(_swiglu), made(_swiglu_backward))
    return _in_cpp(plain) if compiled or cpp else plain


def _in_cpp(other: Kernels) -> Kernels:
    """Our C++ kernels; the other ones for what these do not take."""

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not _cpp_takes(x, weight):
            return other.norm(x, weight, eps)
        result: Tensor = cpp_kernels().rms_norm(_rows(x), weight, eps)
        return result.view(x.shape)

    def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if not _cpp_takes(x, weight):
            return other.norm_backward(dy, x, weight, eps)
        dx, dweight = cpp_kernels().rms_norm_backward(_rows(dy), _rows(x), weight, eps)
        return dx.view(x.shape), dweight

    def swiglu(gate_up: Tensor, gates_R: Tensor | None) -> Tensor:
        if not _cpp_takes(gate_up, gates_R):
            return other.swiglu(gate_up, gates_R)
        result: Tensor = cpp_kernels().swiglu(_rows(gate_up), _whole(gates_R))
        return result.view(*gate_up.shape[:-1], -1)

    def swiglu_backward(dy: Tensor, gate_up: Tensor, gates_R: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not _cpp_takes(gate_up, gates_R):
            return other.swiglu_backward(dy, gate_up, gates_R)
        dgate_up, dgates_R = cpp_kernels().swiglu_backward(_rows(dy), _rows(gate_up), _whole(gates_R))
        return dgate_up.view(gate_up.shape), None if gates_R is None else dgates_R

    return Kernels(norm, norm_backward, swiglu, swiglu_backward)


def _cpp_takes(x: Tensor, beside: Tensor | None) -> bool:
    """Rows that are not empty, with weights or gates in FP32 beside them."""
    return x.dim() > 1 and x.numel() > 0 and suits(x) and (beside is None or beside.dtype == torch.float32)


def _rows(x: Tensor) -> Tensor:
    """x [..., D] as rows [R, D], each of which lies in one piece."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _whole(gates_R: Tensor | None) -> Tensor | None:
    return None if gates_R is None else gates_R.contiguous()


def rms_norm(x: Tensor, weight_D: nn.Parameter, eps: float, kernels: Kernels) -> Tensor:
    """x / rms(x) · weight over the last dimension, computed in at least FP32, returned in x's dtype."""
    if not torch.is_grad_enabled():  # an autograd function costs more than the arithmetic of a few rows
        return kernels.norm(x, weight_D.detach(), eps)
    return _RMSNorm.apply(x, weight_D, eps, kernels)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, eps: float, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.eps, ctx.kernels = weight, eps, kernels
        return kernels.norm(x, weight.detach(), eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx, dweight = ctx.kernels.norm_backward(dy, x, ctx.weight.detach(), ctx.eps)
        # The weight's gradient is a sum over tokens that needs the normed x; keeping that for W would cost more
        # than the sum itself, so it is added here.
        grad_of(ctx.weight).add_(dweight)
        return dx, None, None, None


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """With r = 1/rms(x): dx = r·(dy∘w) − x·r³·mean(dy∘w∘x), and dw = Σ r·(dy∘x) over the rows."""
    high, dy_high = x.to(weight.dtype), dy.to(weight.dtype)
    size = x.shape[-1]
    r = torch.rsqrt(torch.linalg.vector_norm(high, dim=-1).square() / size + eps)
    both = dy_high * high
    along = (both @ weight) * r.pow(3) / size
    dweight = both.mul_(r.unsqueeze(-1)).flatten(0, -2).sum(0)
    dx = (dy_high * weight).mul_(r.unsqueeze(-1)).addcmul_(high, along.unsqueeze(-1), value=-1)
    return dx.to(x.dtype), dweight


def swiglu(gate_up: Tensor, gates_R: Tensor | None, kernels: Kernels) -> Tensor:
    """silu(gate) · up [· router gate per row]: [..., 2F] → [..., F]. Keeps only its inputs."""
    if not torch.is_grad_enabled():
        return kernels.swiglu(gate_up, gates_R)
    return _SwiGLU.apply(gate_up, gates_R, kernels)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, gates_R: Tensor | None, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate_up, gates_R)
        ctx.kernels = kernels
        return kernels.swiglu(gate_up, gates_R)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, gates_R = ctx.saved_tensors
        return (*ctx.kernels.swiglu_backward(dy, gate_up, gates_R), None)


def _swiglu(gate_up: Tensor, gates_R: Tensor | None) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = F.silu(gate).mul_(up)
    return hidden if gates_R is None else hidden.mul_(gates_R.unsqueeze(-1).to(hidden.dtype))


def _swiglu_backward(dy: Tensor, gate_up: Tensor, gates_R: Tensor | None) -> tuple[Tensor, Tensor | None]:
    gate, up = gate_up.chunk(2, dim=-1)
    dgate_up = torch.empty_like(gate_up)
    dgate, dup = dgate_up.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=dup)
    dup *= dy
    torch.mul(dy, up, out=dgate)
    dgates = None
    if gates_R is not None:
        dgates = torch.linalg.vecdot(dup, up).to(gates_R.dtype)
        weights_R1 = gates_R.unsqueeze(-1).to(dy.dtype)
        dup *= weights_R1
        dgate *= weights_R1
    torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    return dgate_up, dgates
