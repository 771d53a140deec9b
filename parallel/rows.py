"""How the vectors of tokens travel: as they are, or in FP8 with their scales.

In FP8 a token's D numbers are D bytes and one scale for every 128 of them. The scales are powers of two, so what
arrives is exactly what was sent, and quantising it again for the expert's first product changes nothing; and a scale is
one byte, its exponent (E8M0). Dispatch
sends this way in forward, and combine in backward: the gradient that enters the down-projection. What comes back from
the experts, and the gradient of what went there, is added up on the way and stays in BF16 (report 3.3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.fp8.backend import Backend
from model.fp8.quantize import E4M3, E8M0, Quantized


class Rows(Protocol):
    """Turns vectors [N, D] into columns that travel, and back."""

    def pack(self, x_ND: Tensor) -> tuple[Tensor, ...]: ...

    def unpack(self, columns: Sequence[Tensor]) -> Tensor: ...


class PlainRows:
    """As they are."""

    def pack(self, x_ND: Tensor) -> tuple[Tensor, ...]:
        return (x_ND,)

    def unpack(self, columns: Sequence[Tensor]) -> Tensor:
        return columns[0]


class Fp8Rows:
    """In FP8, as bytes: gloo has no FP8 types."""

    def __init__(self, backend: Backend, dtype: torch.dtype) -> None:
        self.backend, self.dtype = backend, dtype

    def pack(self, x_ND: Tensor) -> tuple[Tensor, ...]:
        tiles = self.quantize(x_ND)
        return tiles.values.view(torch.uint8), tiles.scales.to(E8M0).view(torch.uint8)

    def unpack(self, columns: Sequence[Tensor]) -> Tensor:
        values, scales = columns
        return self.restore(values, scales.contiguous().view(E8M0).float())

    def quantize(self, x_ND: Tensor) -> Quantized:
        """What travels of x, the scales in FP32."""
        return self.backend.quantize(x_ND, power_of_two=True)

    def restore(self, values_ND: Tensor, scales: Tensor) -> Tensor:
        """From bytes and FP32 scales [N, D], in the dtype of the activations."""
        return Quantized(values_ND.view(E4M3), scales).dequantize(self.dtype)
