"""A Triton kernel for silu(gate) · up [· router gate] and its quantisation: the hidden never reaches memory in FP32."""

from __future__ import annotations

from torch import Tensor

from model.fp8.quantize import TILE, Quantized
from model.fp8.triton_e4m3 import INTERPRETED, WIDTH, tile_scale, tl, to_e4m3, triton
from model.fp8.triton_quantize import STRIPE, empty_tiles


def swiglu_quantize(gate_up_R2F: Tensor, gates_R: Tensor | None, power_of_two: bool = False) -> Quantized:
    """1 × 128 tiles [R, F] of the SwiGLU of [gate | up], computed in FP32."""
    R, F = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    out = empty_tiles(R, F, gate_up_R2F.device)
    if R and F:
        _swiglu_kernel[(triton.cdiv(R, STRIPE), triton.cdiv(F, TILE))](
            gate_up_R2F.contiguous(), gates_R, out.values, out.scales, R, F,
            WEIGHTED=gates_R is not None, POWER_OF_TWO=power_of_two, PREROUND=INTERPRETED, ROWS=STRIPE,
        )  # fmt: skip
    return out


@triton.jit
def _swiglu_kernel(
    gate_up_ptr, gates_ptr, values_ptr, scales_ptr, R, F,
    WEIGHTED: tl.constexpr, POWER_OF_TWO: tl.constexpr, PREROUND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    columns = tile * WIDTH + tl.arange(0, WIDTH)
    mask = (rows < R)[:, None] & (columns < F)[None, :]
    gate_at = gate_up_ptr + rows[:, None] * (2 * F) + columns[None, :]
    gate = tl.load(gate_at, mask, 0.0).to(tl.float32)
    hidden = gate / (1.0 + tl.exp(-gate)) * tl.load(gate_at + F, mask, 0.0).to(tl.float32)
    if WEIGHTED:
        hidden *= tl.load(gates_ptr + rows, rows < R, 0.0).to(tl.float32)[:, None]
    scale = tile_scale(hidden, 1, POWER_OF_TWO)
    values = to_e4m3(tl.div_rn(hidden, tl.broadcast_to(scale[:, None], ROWS, WIDTH)), PREROUND)
    tl.store(values_ptr + rows[:, None] * F + columns[None, :], values, mask)
    tl.store(scales_ptr + rows * tl.cdiv(F, WIDTH) + tile, scale, rows < R)
