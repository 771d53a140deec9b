"""E5M6: 12 bits with 5 of exponent and 6 of mantissa, for the one tensor that E4M3 is too coarse for (report 3.3.3).

The input of the Linear after the attention is kept for Wgrad, where it is quantised to E4M3 along the other side.
Kept in E4M3 it would be rounded to 3 bits of mantissa twice, along both sides. E5M6 is FP16 without its last four bits,
stored as a byte with the upper eight bits of each element and a byte with the lower four of two neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.fp8.quantize import TILE, Quantized


def pack(x_MK: Tensor, tiles: Quantized) -> tuple[Tensor, Tensor, Tensor]:
    """(upper uint8 [M, K], lower uint8 [M, ⌈K/2⌉], scales) of x, with the power-of-two scales of its E4M3 tiles."""
    scales = tiles.scales
    scaled = (x_MK.float() / _spread(scales, x_MK.shape[1])).to(torch.float16)
    bits = scaled.view(torch.int16).to(torch.int32) & 0xFFFF
    bits = (bits + 7 + ((bits >> 4) & 1)) >> 4  # to nearest even, 12 bits are left
    nibbles = bits & 0xF
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    lower = nibbles[:, ::2] | (nibbles[:, 1::2] << 4)
    return (bits >> 4).to(torch.uint8), lower.to(torch.uint8), scales


def unpack(upper_MK: Tensor, lower: Tensor, scales: Tensor) -> Tensor:
    """What `pack` has stored, as FP32 [M, K]."""
    K = upper_MK.shape[1]
    nibbles = torch.stack((lower & 0xF, lower >> 4), -1).flatten(1)[:, :K]
    bits = (upper_MK.to(torch.int32) << 8) | (nibbles.to(torch.int32) << 4)
    return bits.to(torch.int16).view(torch.float16).float() * _spread(scales, K)


def _spread(scales: Tensor, K: int) -> Tensor:
    return scales.repeat_interleave(TILE, dim=1)[:, :K]
