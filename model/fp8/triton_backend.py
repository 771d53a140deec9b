"""The Triton backend: our own kernels behind the FP8 protocol, for NVIDIA's Hopper and Blackwell GPUs.

Not run on a GPU so far. tests/test_triton.py runs every kernel in Triton's interpreter against the reference backend,
and compiles every kernel for Hopper and Blackwell, where it finds the FP8 tensor-core instruction and no spilled
registers.

Shapes as in `backend.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.fp8 import triton_gemm
from model.fp8.quantize import Quantized
from model.fp8.triton_e4m3 import INTERPRETED
from model.fp8.triton_quantize import quantize_columns, quantize_rows, quantize_weight
from model.fp8.triton_swiglu import swiglu_quantize


class TritonBackend:
    """Raises ValueError where the kernels cannot run."""

    name = "triton"

    def __init__(self) -> None:
        if INTERPRETED:
            return
        if not torch.cuda.is_available():
            raise ValueError(
                "precision.backend=triton needs an NVIDIA GPU, and there is none; use precision.backend=reference, or "
                "set TRITON_INTERPRET=1 before the start to run the kernels in Triton's interpreter (very slow)"
            )
        if (capability := torch.cuda.get_device_capability())[0] not in (9, 10):
            raise ValueError(
                f"precision.backend=triton is compiled for Hopper and Blackwell (compute capability 9 and 10) only; "
                f"{torch.cuda.get_device_name()} has {capability}; use precision=bf16"
            )

    def quantize(self, x_TK: Tensor, power_of_two: bool = False) -> Quantized:
        return quantize_rows(x_TK, power_of_two)

    def quantize_weight(self, w_NK: Tensor, power_of_two: bool = False) -> Quantized:
        return quantize_weight(w_NK, power_of_two)

    def quantize_transposed(
        self, x_RK: Tensor, counts: Sequence[int] | None = None, power_of_two: bool = False
    ) -> Quantized:
        return quantize_columns(x_RK, None, counts, power_of_two)

    def requantize_transposed(
        self, x_RK: Quantized, counts: Sequence[int] | None = None, power_of_two: bool = False
    ) -> Quantized:
        return quantize_columns(x_RK.values, x_RK.scales, counts, power_of_two)

    def swiglu_quantize(self, gate_up_R2F: Tensor, gates_R: Tensor | None, power_of_two: bool = False) -> Quantized:
        return swiglu_quantize(gate_up_R2F, gates_R, power_of_two)

    def permute_quantize(self, x_TK: Tensor, index_R: Tensor, power_of_two: bool = False) -> Quantized:
        return quantize_rows(x_TK, power_of_two, index_R)

    def gemm(self, a_MK: Quantized, b_NK: Quantized, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
        out_MN = torch.empty(a_MK.shape[0], b_NK.shape[0], dtype=out_dtype, device=a_MK.values.device)
        triton_gemm.gemm(a_MK, b_NK, out_MN, add=False)
        return out_MN

    def grouped_gemm(
        self, a_RK: Quantized, b_ENK: Quantized, counts: Sequence[int], out_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        out_RN = torch.empty(a_RK.shape[0], b_ENK.shape[1], dtype=out_dtype, device=a_RK.values.device)
        triton_gemm.grouped_gemm(a_RK, b_ENK, counts, out_RN)
        return out_RN

    def add_wgrad(self, grad_NK: Tensor, dy_NP: Quantized, x_KP: Quantized) -> None:
        triton_gemm.gemm(dy_NP, x_KP, grad_NK, add=True)

    def add_grouped_wgrad(self, grad_ENK: Tensor, dy_NP: Quantized, x_KP: Quantized, counts: Sequence[int]) -> None:
        triton_gemm.add_grouped_wgrad(dy_NP, x_KP, counts, grad_ENK)
