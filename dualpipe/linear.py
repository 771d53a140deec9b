"""Plain `nn.Linear` layers whose weight gradients wait for the schedule's W."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualpipe.wgrad import WeightGradQueue


def defer_linear_weights(module: nn.Module, queue: WeightGradQueue) -> None:
    """Make every plain `nn.Linear` inside a module hand its weight gradient to the queue.

    The gradient ends in `weight.grad` as ever, but past autograd: hooks on the parameter do not see it. Subclasses of
    Linear, and weights that are computed from others (weight norm), are left to autograd; then they run in I.
    """
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.forward = partial(_forward, layer, queue)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, queue: WeightGradQueue, x: Tensor) -> Tensor:
    parameters = [p for p in (layer.weight, layer.bias) if p is not None]
    plain = all(type(p) is nn.Parameter and p.requires_grad for p in parameters)
    if not plain or not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, layer.weight, layer.bias)
    return _Linear.apply(x, layer.weight, layer.bias, queue)


class _Linear(torch.autograd.Function):
    """y [..., out] = x [..., in] · weightᵀ [in, out] + bias; the gradients of weight and bias are put aside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, queue: WeightGradQueue) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias, ctx.queue = bias, queue
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.queue.put(partial(_accumulate, weight, ctx.bias, x, grad))
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, None


@torch.no_grad()
def _accumulate(weight: Tensor, bias: Tensor | None, x: Tensor, grad: Tensor) -> None:
    rows = grad.reshape(-1, grad.shape[-1])
    _add(weight, rows.T @ x.reshape(-1, x.shape[-1]))
    if bias is not None:
        _add(bias, rows.sum(0))


def _add(parameter: Tensor, grad: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad += grad
