"""Products of a few rows with weights, as generation makes them on a CPU: their time is that of reading the weights.

MKL and oneDNN are far from the memory's speed when a product has one to eight rows. Asked for weight · rowsᵀ instead
of rows · weightᵀ, MKL reads a weight two to four times as fast; a single row is fastest as a batch of slices of the
weight, one per thread. And one batched product over all experts replaces a call for each of them: every expert gets
SLAB rows, missing ones are zeros, and experts with more rows do the rest alone (figures: docs/log.md).

Results differ from `products.py` in rounding only. Training does not come here: it has many rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.products import FEW_ROWS, blocks, grouped_product, product

SLAB = 4  # rows that every expert gets in the batched product

SMALL_WEIGHT = 2**19  # elements up to which it is for more than two rows: from there oneDNN reads as fast


def few_rows_product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a · bᵀ → [M, N], as `products.product`."""
    if 0 < len(a_MK) <= SLAB and _suits(a_MK, b_NK) and (len(a_MK) <= 2 or b_NK.numel() <= SMALL_WEIGHT):
        return narrow_product(a_MK, b_NK)
    return product(a_MK, b_NK)


def few_rows_grouped_product(x_RK: Tensor, weight_ENK: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows sorted by expert, each block times its expert's weightᵀ → [R, N], as `products.grouped_product`."""
    if not _suits(x_RK, weight_ENK, (torch.bfloat16,)) or len(x_RK) > SLAB * len(counts):
        return grouped_product(x_RK, weight_ENK, counts)
    if is_batchable(x_RK, counts):
        out_RN, todo = batched_product(x_RK, weight_ENK, counts)
    else:
        out_RN, todo = x_RK.new_empty(len(x_RK), weight_ENK.shape[1]), list(blocks(counts))
    for expert, rows in todo:
        narrow = rows.stop - rows.start <= FEW_ROWS and x_RK.dtype != torch.bfloat16
        multiply = narrow_product if narrow else product
        out_RN[rows] = multiply(x_RK[rows], weight_ENK[expert])
    return out_RN


def narrow_product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a · bᵀ → [M, N] for a few rows and a contiguous b."""
    (rows, width), height = a_MK.shape, b_NK.shape[0]
    if rows > 1:
        return (b_NK @ a_MK.t()).t().contiguous()
    parts = torch.get_num_threads()
    if height % parts:
        parts = 1
    slices = b_NK.view(parts, height // parts, width)
    return torch.bmm(slices, a_MK.expand(parts, 1, width).mT).view(1, height)


def is_batchable(x_RK: Tensor, counts: Sequence[int]) -> bool:
    """Whether one product over all experts pays: few of them are without rows, whose weights are read for nothing."""
    return 0 < len(x_RK) <= SLAB * len(counts) and 2 * sum(count > 0 for count in counts) >= len(counts)


def batched_product(x_RK: Tensor, weight_ENK: Tensor, counts: Sequence[int]) -> tuple[Tensor, list[tuple[int, slice]]]:
    """Rows sorted by expert times its weightᵀ → [R, N], and which rows of which experts are still missing in it."""
    places: list[int] = []
    rows: list[int] = []
    missing: list[tuple[int, slice]] = []
    start = 0
    for expert, count in enumerate(counts):
        taken = min(count, SLAB)
        places += range(expert * SLAB, expert * SLAB + taken)
        rows += range(start, start + taken)
        if count > SLAB:
            missing.append((expert, slice(start + SLAB, start + count)))
        start += count
    E, N, K = weight_ENK.shape
    place_R = torch.tensor(places)
    slabs_XK = x_RK.new_zeros(E * SLAB, K)
    if not missing:
        slabs_XK[place_R] = x_RK
        return _slabs(slabs_XK.view(E, SLAB, K), weight_ENK).view(E * SLAB, N)[place_R], missing
    row_R = torch.tensor(rows)
    slabs_XK[place_R] = x_RK[row_R]
    out_RN = x_RK.new_empty(len(x_RK), N)
    out_RN[row_R] = _slabs(slabs_XK.view(E, SLAB, K), weight_ENK).view(E * SLAB, N)[place_R]
    return out_RN, missing


def _slabs(slabs_ESK: Tensor, weight_ENK: Tensor) -> Tensor:
    """[E, S, N]. BF16 is oneDNN's, and fastest the usual way round."""
    if slabs_ESK.dtype == torch.bfloat16:
        return torch.bmm(slabs_ESK, weight_ENK.mT)
    return torch.bmm(weight_ENK, slabs_ESK.mT).mT.contiguous()


def _suits(x: Tensor, weight: Tensor, more: tuple[torch.dtype, ...] = ()) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64, *more) and weight.is_contiguous()
