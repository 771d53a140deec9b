"""The reference backend: plain PyTorch, on any device. It is what the other backends are tested against.

It really stores float8_e4m3fn and really rounds; only the product itself is not done by FP8 units. Its operands are
multiplied with their scales in FP32 first, and each 128 of K is one FP32 product, added up in FP32. An E4M3 number
times another is exact in FP32, so this is the arithmetic of the report but for the order of additions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8.quantize import (
    TILE,
    Quantized,
    padded_counts,
    quantize_blocks,
    quantize_tiles,
    quantize_transposed,
)
from model.products import ROW_STEP, blocks, product


class ReferenceBackend:
    name = "reference"

    def quantize(self, x_TK: Tensor, power_of_two: bool = False) -> Quantized:
        return quantize_tiles(x_TK, power_of_two)

    def quantize_weight(self, w_NK: Tensor, power_of_two: bool = False) -> Quantized:
        return quantize_blocks(w_NK, power_of_two)

    def quantize_transposed(
        self, x_RK: Tensor, counts: Sequence[int] | None = None, power_of_two: bool = False
    ) -> Quantized:
        return quantize_transposed(x_RK, counts, power_of_two)

    def requantize_transposed(
        self, x_RK: Quantized, counts: Sequence[int] | None = None, power_of_two: bool = False
    ) -> Quantized:
        return quantize_transposed(x_RK.dequantize(), counts, power_of_two)

    def swiglu_quantize(self, gate_up_R2F: Tensor, gates_R: Tensor | None, power_of_two: bool = False) -> Quantized:
        return quantize_tiles(swiglu(gate_up_R2F, gates_R), power_of_two)

    def permute_quantize(self, x_TK: Tensor, index_R: Tensor, power_of_two: bool = False) -> Quantized:
        return quantize_tiles(x_TK[index_R], power_of_two)

    def gemm(self, a_MK: Quantized, b_NK: Quantized, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return promoted_product(a_MK.dequantize(), b_NK.dequantize()).to(out_dtype)

    def grouped_gemm(
        self, a_RK: Quantized, b_ENK: Quantized, counts: Sequence[int], out_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        a, b = a_RK.dequantize(), b_ENK.dequantize()
        out = torch.empty(a.shape[0], b.shape[1], dtype=out_dtype, device=a.device)
        for expert, rows in blocks(counts):
            size = rows.stop - rows.start
            more = slice(rows.start, min(len(a), rows.start - (-size // ROW_STEP) * ROW_STEP))  # see model/products.py
            out[rows] = promoted_product(a[more], b[expert])[:size]
        return out

    def add_wgrad(self, grad_NK: Tensor, dy_NP: Quantized, x_KP: Quantized) -> None:
        grad_NK.add_(promoted_product(dy_NP.dequantize(), x_KP.dequantize()))

    def add_grouped_wgrad(self, grad_ENK: Tensor, dy_NP: Quantized, x_KP: Quantized, counts: Sequence[int]) -> None:
        dy, x = dy_NP.dequantize(), x_KP.dequantize()
        for expert, columns in blocks(padded_counts(counts)):
            grad_ENK[expert].add_(promoted_product(dy[:, columns], x[:, columns]))


def promoted_product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a · bᵀ as a sum of FP32 products over 128 of K each."""
    parts = zip(a_MK.split(TILE, 1), b_NK.split(TILE, 1), strict=True)
    a, b = next(parts)
    total = product(a, b)
    for a, b in parts:
        total += product(a, b)
    return total


def swiglu(gate_up: Tensor, gates_R: Tensor | None) -> Tensor:
    """In FP32, whatever the input's dtype."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    hidden = F.silu(gate).mul_(up)
    return hidden if gates_R is None else hidden.mul_(gates_R.unsqueeze(-1))
