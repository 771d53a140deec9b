"""One Triton kernel for every FP8 product of a Linear and of the grouped expert Linear.

    out = a · bᵀ        a [M, K] in 1 × 128 tiles, b [N, K] in 128 × 128 blocks (Fprop, Dgrad) or 1 × 128 tiles (Wgrad)

Each 128 of K are one product of the tensor cores that begins at zero; its result is multiplied with the scales, which
change there, and added to an FP32 sum in ordinary registers (the promotion of `backend.py`).

Groups are uneven and may be empty, and are not padded to equal sizes:

    by rows     the rows of a are sorted by group, and each group has its own b: the experts in Fprop and Dgrad
    by depth    the sum over K is cut at the groups, and each group has its own out: the experts in Wgrad
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from model.fp8.quantize import TILE, Quantized
from model.fp8.triton_e4m3 import WIDTH, tl, triton
from model.fp8.triton_quantize import row_tiles

BY_ROWS, BY_DEPTH = tl.constexpr(1), tl.constexpr(2)


def gemm(a_MK: Quantized, b_NK: Quantized, out_MN: Tensor, add: bool) -> None:
    """out = or += a · bᵀ; b in blocks or in tiles, possibly a transposed view."""
    M, N, K = _sizes(a_MK, b_NK, tuple(out_MN.shape))
    options = launch_options(M, b_NK)
    grid = (triton.cdiv(M, options["BLOCK_M"]), triton.cdiv(N, options["BLOCK_N"]))
    _launch(grid, a_MK, b_NK, out_MN, None, (M, N, K), {**options, "GROUPS": 0, "ADD": add})


def grouped_gemm(a_RK: Quantized, b_ENK: Quantized, counts: Sequence[int], out_RN: Tensor) -> None:
    """out = rows of a sorted by expert, counts[e] of them for expert e, each times b[e]ᵀ."""
    R, N, K = _sizes(a_RK, b_ENK, tuple(out_RN.shape))
    _check_counts(counts, R, len(b_ENK.values))
    options = launch_options(max(counts, default=0), b_ENK)
    table = row_tiles(counts, options["BLOCK_M"], out_RN.device)
    grid = (len(table), triton.cdiv(N, options["BLOCK_N"]))
    _launch(grid, a_RK, b_ENK, out_RN, table, (R, N, K), {**options, "GROUPS": BY_ROWS.value, "ADD": False})


def add_grouped_wgrad(a_MP: Quantized, b_NP: Quantized, counts: Sequence[int], out_EMN: Tensor) -> None:
    """out[e] += a · bᵀ over the columns of expert e, which `quantize_columns` has padded to multiples of 128."""
    M, N, P = _sizes(a_MP, b_NP, tuple(out_EMN.shape[1:]))
    ends = [0, *accumulate(triton.cdiv(count, TILE) for count in counts)]
    _check_counts([TILE * (end - start) for start, end in pairwise(ends)], P, len(out_EMN))
    options = launch_options(M, b_NP)
    table = torch.tensor(ends, dtype=torch.int32).to(out_EMN.device, non_blocking=True)
    grid = (len(counts) * triton.cdiv(M, options["BLOCK_M"]), triton.cdiv(N, options["BLOCK_N"]))
    _launch(grid, a_MP, b_NP, out_EMN, table, (M, N, P), {**options, "GROUPS": BY_DEPTH.value, "ADD": True})


def launch_options(rows: int, b_NK: Quantized) -> dict[str, Any]:
    """Block sizes and pipeline: what fits the registers, as tests/test_triton_compile.py sees it.

    A warp group (4 warps) does 64 rows. Tiles in b need registers for their scales; operands whose rows are no
    multiples of 16 bytes are read byte by byte, and need registers for that.
    """
    aligned = b_NK.shape[-1] % 16 == 0 and max(b_NK.values.stride()[-2:]) % 16 == 0
    block_m = 128 if rows > 64 and aligned else 64
    block_n = 128 if b_NK.group_rows == TILE and aligned else 64
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": block_m // 16, "num_stages": 3}


def _launch(
    grid: tuple[int, int], a: Quantized, b: Quantized, out: Tensor, table: Tensor | None, sizes: tuple[int, int, int],
    options: dict[str, Any],
) -> None:  # fmt: skip
    if not out.is_contiguous():
        raise ValueError(f"the product needs a contiguous out, got {tuple(out.shape)} with strides {out.stride()}")
    if 0 in grid:
        return
    steps = (b.values.stride(0), b.scales.stride(0)) if b.values.ndim == 3 else (0, 0)
    _gemm_kernel[grid](
        a.values.contiguous(), a.scales.contiguous(), b.values, b.scales, out, table, *sizes, *steps,
        *b.values.stride()[-2:], *b.scales.stride()[-2:], B_TILES=b.group_rows == 1, **options,
    )  # fmt: skip


def _sizes(a: Quantized, b: Quantized, out: tuple[int, ...]) -> tuple[int, int, int]:
    """M, N, K. Raises ValueError for operands that do not belong together."""
    M, K = a.shape
    N = b.shape[-2]
    if b.shape[-1] != K or a.group_rows != 1 or b.group_rows not in (1, TILE) or out != (M, N):
        raise ValueError(
            f"a {tuple(a.shape)} in groups of {a.group_rows} × {TILE}, b {tuple(b.shape)} of {b.group_rows} × {TILE} "
            f"and out {out} do not fit; a is in tiles [M, K], b in tiles or blocks [N, K], out [M, N]"
        )
    return M, N, K


def _check_counts(counts: Sequence[int], rows: int, groups: int) -> None:
    if len(counts) != groups or sum(counts) != rows:
        raise ValueError(f"counts {list(counts)} do not divide {rows} rows among {groups} groups")


@triton.jit
def _gemm_kernel(
    a_ptr, a_scales_ptr, b_ptr, b_scales_ptr, out_ptr, table_ptr, M, N, K, b_step, b_scales_step,
    b_n, b_k, b_scales_n, b_scales_k, GROUPS: tl.constexpr, B_TILES: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(K, WIDTH)
    # Which rows of a, which columns of out, which group, which part of the sum.
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    end, first_tile, end_tile = M, 0, tiles
    if GROUPS == BY_ROWS:
        group = tl.load(table_ptr + tl.program_id(0) * 3).to(tl.int64)
        row = tl.load(table_ptr + tl.program_id(0) * 3 + 1)
        end = tl.load(table_ptr + tl.program_id(0) * 3 + 2)
        b_ptr += group * b_step
        b_scales_ptr += group * b_scales_step
    if GROUPS == BY_DEPTH:
        blocks = tl.cdiv(M, BLOCK_M)
        group = (tl.program_id(0) // blocks).to(tl.int64)
        row = tl.program_id(0) % blocks * BLOCK_M
        first_tile, end_tile = tl.load(table_ptr + group), tl.load(table_ptr + group + 1)
        out_ptr += group * M * N

    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    depth = tl.arange(0, WIDTH)
    in_a, in_b = m < end - row, n < N - column
    a_ptr += tl.cast(row, tl.int64) * K
    a_scales_ptr += tl.cast(row, tl.int64) * tiles
    b_ptr += tl.cast(column, tl.int64) * b_n
    b_scales_ptr += (column if B_TILES else column // WIDTH) * b_scales_n

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(first_tile, end_tile):
        k = tile * WIDTH + depth
        a = tl.load(a_ptr + m[:, None] * K + k[None, :], in_a[:, None] & (k < K)[None, :], 0.0)
        b = tl.load(b_ptr + n[None, :] * b_n + k[:, None] * b_k, in_b[None, :] & (k < K)[:, None], 0.0)
        partial = tl.dot(a, b)
        a_scale = tl.load(a_scales_ptr + m * tiles + tile, in_a, 0.0)
        if B_TILES:
            b_scale = tl.load(b_scales_ptr + n * b_scales_n + tile * b_scales_k, in_b, 0.0)
            sums += partial * a_scale[:, None] * b_scale[None, :]
        else:
            sums += partial * (a_scale * tl.load(b_scales_ptr + tile * b_scales_k))[:, None]

    to = out_ptr + tl.cast(row, tl.int64) * N + column + m[:, None] * N + n[None, :]
    in_out = in_a[:, None] & in_b[None, :]
    if ADD:
        sums += tl.load(to, in_out, 0.0).to(tl.float32)
    tl.store(to, sums.to(out_ptr.dtype.element_ty), in_out)
