"""Triton kernels that quantise: along rows, along columns, in blocks.

    rows       1 × 128 tiles of [M, K]: the operand of Fprop and of Dgrad. Rows may be gathered by an index on the way.
    columns    128 × 1 tiles of [R, K], written transposed: both operands of Wgrad, which sums over rows, while the
               tensor cores read FP8 along the sum only. Takes FP8 in 1 × 128 tiles as well, and quantises it again.
    blocks     128 × 128 blocks of a weight

Each reads its input once and writes each result once. Semantics as in `quantize.py`, bit for bit. Letters as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.fp8.quantize import E4M3, TILE, Quantized
from model.fp8.triton_e4m3 import INTERPRETED, WIDTH, tile_scale, tl, to_e4m3, triton

STRIPE = 128 if INTERPRETED else 32  # rows of a program; the interpreter's cost is per program


def quantize_rows(x_MK: Tensor, power_of_two: bool = False, index_R: Tensor | None = None) -> Quantized:
    """`quantize_tiles` of x, any strides; with an index [R] of x[index], without making that."""
    M, K = x_MK.shape
    M = M if index_R is None else len(index_R)
    out = empty_tiles(M, K, x_MK.device)
    if M and K:
        _rows_kernel[(triton.cdiv(M, STRIPE), triton.cdiv(K, TILE))](
            x_MK, index_R, out.values, out.scales, M, K, *x_MK.stride(),
            GATHER=index_R is not None, POWER_OF_TWO=power_of_two, PREROUND=INTERPRETED, ROWS=STRIPE,
        )  # fmt: skip
    return out


def quantize_columns(
    x_RK: Tensor, scales: Tensor | None, counts: Sequence[int] | None, power_of_two: bool = False
) -> Quantized:
    """`quantize_transposed` of x; with scales [R, ⌈K/128⌉], of the FP8 tensor in 1 × 128 tiles that x then is."""
    R, K = x_RK.shape
    counts = [R] if counts is None else counts
    if sum(counts) != R:
        raise ValueError(f"{R} rows, but the groups are of {list(counts)}: {sum(counts)} in all")
    table = row_tiles(counts, TILE, x_RK.device)
    out = empty_tiles(K, len(table) * TILE, x_RK.device)
    if len(table) and K:
        _columns_kernel[(len(table), triton.cdiv(K, STRIPE))](
            x_RK, scales, table, out.values, out.scales, K, len(table), *x_RK.stride(),
            DEQUANTIZE=scales is not None, POWER_OF_TWO=power_of_two, PREROUND=INTERPRETED, COLUMNS=STRIPE,
        )  # fmt: skip
    return out


def quantize_weight(w_NK: Tensor, power_of_two: bool = False) -> Quantized:
    """`quantize_blocks` of one weight [N, K], or of stacked ones [E, N, K]."""
    N, K = w_NK.shape[-2:]
    w_ENK = w_NK.reshape(-1, N, K)
    blocks = triton.cdiv(N, TILE), triton.cdiv(K, TILE)
    values = torch.empty(w_NK.shape, dtype=E4M3, device=w_NK.device)
    scales = torch.empty((*w_NK.shape[:-2], *blocks), device=w_NK.device)
    if w_ENK.numel():
        _blocks_kernel[(len(w_ENK), *blocks)](
            w_ENK, values, scales, N, K, *w_ENK.stride(),
            POWER_OF_TWO=power_of_two, PREROUND=INTERPRETED, num_warps=8,
        )  # fmt: skip
    return Quantized(values, scales, TILE)


def row_tiles(counts: Sequence[int], size: int, device: torch.device) -> Tensor:
    """[tiles, 3] int32: the group, the first row and the end of the rows of each tile of at most `size` rows."""
    table, start = [], 0
    for group, count in enumerate(counts):
        end = start + count
        table += [(group, row, min(row + size, end)) for row in range(start, end, size)]
        start = end
    return torch.tensor(table, dtype=torch.int32).view(-1, 3).to(device, non_blocking=True)


def empty_tiles(M: int, K: int, device: torch.device) -> Quantized:
    """Room for a tensor in 1 × 128 tiles."""
    return Quantized(torch.empty(M, K, dtype=E4M3, device=device), torch.empty(M, triton.cdiv(K, TILE), device=device))


@triton.jit
def _rows_kernel(
    x_ptr, index_ptr, values_ptr, scales_ptr, M, K, stride_m, stride_k,
    GATHER: tl.constexpr, POWER_OF_TWO: tl.constexpr, PREROUND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    columns = tile * WIDTH + tl.arange(0, WIDTH)
    source = tl.load(index_ptr + rows, rows < M, 0).to(tl.int64) if GATHER else rows
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + source[:, None] * stride_m + columns[None, :] * stride_k, mask, 0.0).to(tl.float32)
    scale = tile_scale(x, 1, POWER_OF_TWO)
    values = to_e4m3(tl.div_rn(x, tl.broadcast_to(scale[:, None], ROWS, WIDTH)), PREROUND)
    tl.store(values_ptr + rows[:, None] * K + columns[None, :], values, mask)
    tl.store(scales_ptr + rows * tl.cdiv(K, WIDTH) + tile, scale, rows < M)


@triton.jit
def _columns_kernel(
    x_ptr, x_scales_ptr, table_ptr, values_ptr, scales_ptr, K, tiles, stride_r, stride_k,
    DEQUANTIZE: tl.constexpr, POWER_OF_TWO: tl.constexpr, PREROUND: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    rows = tl.load(table_ptr + tile * 3 + 1).to(tl.int64) + tl.arange(0, WIDTH)
    end = tl.load(table_ptr + tile * 3 + 2)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < end)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_r + columns[None, :] * stride_k, mask, 0.0).to(tl.float32)
    if DEQUANTIZE:
        x *= tl.load(x_scales_ptr + rows[:, None] * tl.cdiv(K, WIDTH) + (columns // WIDTH)[None, :], mask, 0.0)
    scale = tile_scale(x, 0, POWER_OF_TWO)
    values = to_e4m3(tl.div_rn(x, tl.broadcast_to(scale[None, :], WIDTH, COLUMNS)), PREROUND)
    to = tile * WIDTH + tl.arange(0, WIDTH)
    tl.store(values_ptr + columns[:, None] * tiles * WIDTH + to[None, :], tl.trans(values), (columns < K)[:, None])
    tl.store(scales_ptr + columns * tiles + tile, scale, columns < K)


@triton.jit
def _blocks_kernel(
    w_ptr,
    values_ptr,
    scales_ptr,
    N,
    K,
    stride_e,
    stride_n,
    stride_k,
    POWER_OF_TWO: tl.constexpr,
    PREROUND: tl.constexpr,
):
    e, n, k = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows, columns = n * WIDTH + tl.arange(0, WIDTH), k * WIDTH + tl.arange(0, WIDTH)
    mask = (rows < N)[:, None] & (columns < K)[None, :]
    at = w_ptr + e * stride_e + rows[:, None].to(tl.int64) * stride_n + columns[None, :].to(tl.int64) * stride_k
    w = tl.load(at, mask, 0.0).to(tl.float32)
    scale = tile_scale(tl.reshape(w, WIDTH * WIDTH), 0, POWER_OF_TWO)
    values = to_e4m3(tl.div_rn(w, tl.broadcast_to(scale, WIDTH, WIDTH)), PREROUND)
    tl.store(values_ptr + (e * N + rows[:, None]) * K + columns[None, :], values, mask)
    tl.store(scales_ptr + (e * tl.cdiv(N, WIDTH) + n) * tl.cdiv(K, WIDTH) + k, scale)
