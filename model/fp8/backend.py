"""What FP8 training needs of a backend: quantising, and products of quantised tensors.

`reference` (plain PyTorch) runs everywhere and defines what every other backend must compute: quantisation bit for
bit, products up to the order of FP32 additions. Linear layers (`linear.py`) are written against this protocol alone.

A Linear y = x · wᵀ has three products, all in FP8, each summing over another dimension:

    Fprop   y [T, N]  = x [T, K] · w [N, K]ᵀ      over K: x in 1×128 tiles, w in 128×128 blocks
    Dgrad   dx [T, K] = dy [T, N] · w              over N: dy in 1×128 tiles, the same blocks of w, transposed
    Wgrad   dw [N, K] = dyᵀ · x                    over T: both in 128×1 tiles, x quantised again from its 1×128 tiles

Why promotion. The tensor cores of Hopper add up products of FP8 numbers with about 14 bits; over thousands of K that
alone would cost several percent of the result (report 3.3.2). So a partial sum over 128 of K is taken out, multiplied
with its two scales and added to an FP32 sum by ordinary units.

Shapes as in `quantize.py`; E experts, T tokens, F width of the SwiGLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.fp8.quantize import Quantized


class Backend(Protocol):
    """Pure functions of tensors. `counts` = rows of each expert, any of which may be zero."""

    name: str

    def quantize(self, x_TK: Tensor, power_of_two: bool = False) -> Quantized:
        """1×128 tiles: `quantize_tiles`."""
        ...

    def quantize_weight(self, w_NK: Tensor, power_of_two: bool = False) -> Quantized:
        """128×128 blocks of [N, K] or [E, N, K]: `quantize_blocks`."""
        ...

    def quantize_transposed(
        self, x_RK: Tensor, counts: Sequence[int] | None = None, power_of_two: bool = False
    ) -> Quantized:
        """128×1 tiles, as the transpose [K, P] with every expert's rows padded: `quantize_transposed`."""
        ...

    def requantize_transposed(
        self, x_RK: Quantized, counts: Sequence[int] | None = None, power_of_two: bool = False
    ) -> Quantized:
        """`quantize_transposed` of what 1×128 tiles stand for."""
        ...

    def swiglu_quantize(self, gate_up_R2F: Tensor, gates_R: Tensor | None, power_of_two: bool = False) -> Quantized:
        """1×128 tiles [R, F] of silu(gate) · up [· router gate], computed in FP32 from gate_up = [gate | up].

        Backends may differ in the last bit of an exponential, and so now and then in a rounding.
        """
        ...

    def permute_quantize(self, x_TK: Tensor, index_R: Tensor, power_of_two: bool = False) -> Quantized:
        """1×128 tiles of the rows x[index]."""
        ...

    def gemm(self, a_MK: Quantized, b_NK: Quantized, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """a · bᵀ [M, N]; b in blocks or tiles along K, possibly a transposed view."""
        ...

    def grouped_gemm(
        self, a_RK: Quantized, b_ENK: Quantized, counts: Sequence[int], out_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """Each expert's rows of a times its bᵀ: [R, N]."""
        ...

    def add_wgrad(self, grad_NK: Tensor, dy_NP: Quantized, x_KP: Quantized) -> None:
        """grad += dy · xᵀ, FP32, of tensors that are transposed already."""
        ...

    def add_grouped_wgrad(self, grad_ENK: Tensor, dy_NP: Quantized, x_KP: Quantized, counts: Sequence[int]) -> None:
        """grad[e] += dy · xᵀ over the columns of expert e, which are padded to multiples of 128."""
        ...
