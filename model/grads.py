"""Where hand-written backwards put the gradient of a parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def grad_of(parameter: nn.Parameter) -> Tensor:
    """Where a parameter's gradient accumulates: `.grad`, zeros if there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def room_for_grad(parameter: nn.Parameter) -> tuple[Tensor, bool]:
    """The same for who can write as well as add: (where, whether it is fresh and may hold anything)."""
    fresh = parameter.grad is None
    if fresh:
        parameter.grad = torch.empty_like(parameter)
    return grad_of(parameter), fresh
