"""The torch backend: quantising in plain PyTorch, products by `torch.nn.functional.scaled_mm`, which calls cuBLASLt.

For Hopper with CUDA 12.9 or later, where cuBLASLt multiplies 1×128 tiles with 128×128 blocks (or other tiles) and
promotes its sums by itself. Nothing has to be compiled, so it is also what the Triton backend can be held against.

cuBLASLt wants whole tiles, rows in fours, both operands with K as the fast dimension, and scales in a layout of its
own; so operands are filled up with zeros where need be, and a transposed weight is copied (one byte per element). Torch
has no grouped product for these scales yet, so there is one call per expert.

Not run on a GPU so far. tests/test_fp8_torch.py checks every call against torch's own rules for shapes and strides, and
multiplies what is passed in that layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from model.fp8.quantize import TILE, Quantized, padded_counts
from model.fp8.reference import ReferenceBackend
from model.products import blocks

ROWS = 16  # cuBLASLt's scales want a multiple of 4 rows, its FP8 operands 16 bytes


class TorchBackend(ReferenceBackend):
    """Raises ValueError where torch has no such product."""

    name = "torch"

    def __init__(self) -> None:
        if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
            found = torch.cuda.get_device_name() if torch.cuda.is_available() else "no NVIDIA GPU"
            raise ValueError(
                f"precision.backend=torch needs a Hopper GPU (compute capability 9.0) and CUDA 12.9, found {found}; "
                f"use precision.backend=reference or triton"
            )

    def gemm(self, a_MK: Quantized, b_NK: Quantized, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return scaled_product(a_MK, b_NK, out_dtype)

    def grouped_gemm(
        self, a_RK: Quantized, b_ENK: Quantized, counts: Sequence[int], out_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        out = torch.empty(a_RK.shape[0], b_ENK.shape[1], dtype=out_dtype, device=a_RK.values.device)
        scales_RK = a_RK.row_scales
        for expert, rows in blocks(counts):
            weight = Quantized(b_ENK.values[expert], b_ENK.scales[expert], TILE)
            out[rows] = scaled_product(Quantized(a_RK.values[rows], scales_RK[rows]), weight, out_dtype)
        return out

    def add_wgrad(self, grad_NK: Tensor, dy_NP: Quantized, x_KP: Quantized) -> None:
        grad_NK.add_(scaled_product(dy_NP, x_KP, torch.float32))

    def add_grouped_wgrad(self, grad_ENK: Tensor, dy_NP: Quantized, x_KP: Quantized, counts: Sequence[int]) -> None:
        for expert, columns in blocks(padded_counts(counts)):
            grad_ENK[expert].add_(scaled_product(_columns(dy_NP, columns), _columns(x_KP, columns), torch.float32))


def scaled_product(a_MK: Quantized, b_NK: Quantized, out_dtype: torch.dtype) -> Tensor:
    """a · bᵀ by one call of scaled_mm; b in blocks or in tiles."""
    M, N = a_MK.shape[0], b_NK.shape[0]
    if not M or not a_MK.shape[1]:
        return torch.zeros(M, N, dtype=out_dtype, device=a_MK.values.device)
    in_blocks = b_NK.group_rows == TILE
    a, b = _filled(a_MK.values, ROWS), _filled(b_NK.values, TILE if in_blocks else ROWS)
    out = F.scaled_mm(
        a,
        b.t(),
        _tile_scales(a_MK, len(a)),
        ScalingType.BlockWise1x128,
        _block_scales(b_NK) if in_blocks else _tile_scales(b_NK, len(b)),
        ScalingType.BlockWise128x128 if in_blocks else ScalingType.BlockWise1x128,
        output_dtype=out_dtype,
    )
    return out[:M, :N]


def _columns(x: Quantized, columns: slice) -> Quantized:
    """Whole tiles of x along K."""
    tiles = slice(columns.start // TILE, columns.stop // TILE)
    return Quantized(x.values[:, columns], x.row_scales[:, tiles])


def _filled(values_MK: Tensor, rows: int) -> Tensor:
    """K-major, with zeros up to a multiple of `rows` and of 128 columns."""
    M, K = values_MK.shape
    if M % rows or K % TILE:
        filled = values_MK.new_zeros(-(-M // rows) * rows, -(-K // TILE) * TILE)
        filled[:M, :K] = values_MK
        return filled
    return values_MK.contiguous()


def _tile_scales(x: Quantized, rows: int) -> Tensor:
    """[rows, ⌈K/128⌉] with rows as the fast dimension."""
    scales = x.row_scales
    out = scales.new_ones(scales.shape[1], rows)
    out[:, : len(scales)] = scales.t()
    return out.t()


def _block_scales(w: Quantized) -> Tensor:
    """[⌈K/128⌉ rounded up to 4, ⌈N/128⌉] with K as the fast dimension."""
    N, K = w.scales.shape
    out = w.scales.new_ones(N, -(-K // 4) * 4)
    out[:, :K] = w.scales
    return out.t()
