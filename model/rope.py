"""Rotary position (RoPE): turn pairs of channels by an angle that grows with the position.

Channels 2j and 2j+1 form a pair and turn by position · base^(−2j/dim). The product of a query and a key then
depends on the distance of their positions alone. DeepSeek-V3 applies it to a small decoupled part of each query
head and to one key part that all heads share (report 2.1.1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(positions: Tensor, dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions [...]: each [..., dim/2]. Angles are computed in FP64: positions get large."""
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    angles = positions.to(torch.float64).unsqueeze(-1) * base**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs of x [..., dim] by the angles [..., dim/2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
