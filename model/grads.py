"""Where hand-written backwards put the gradient of a parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def grad_of(parameter: nn.Parameter) -> Tensor:
    """Where a parameter's gradient accumulates: `.grad`, zeros if there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
