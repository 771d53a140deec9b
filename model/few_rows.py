"""Products of a few rows with weights, as generation makes them on a CPU: their time is that of reading the weights.

MKL and oneDNN are far from the memory's speed when a product has one to eight rows. Asked for weight · rowsᵀ instead
of rows · weightᵀ, MKL reads a weight two to four times as fast; a single row is fastest as a batch of slices of the
weight, one per thread. And one batched product over all experts replaces a call for each of them: every expert gets
as many rows, missing ones are zeros, and experts with more rows do the rest alone (figures: docs/log.md).

Results differ from `products.py` in rounding only. Training does not come here: it has many rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.products import FEW_ROWS, blocks, grouped_product, product

SLAB = 4  # rows of an expert up to which weight · rowsᵀ is the fastest in a batched product
MEAN_ROWS = 24  # rows per expert up to which a batched product is faster than a loop, if there are threads to share it

SMALL_WEIGHT = 2**19  # elements up to which it is for more than two rows: from there oneDNN reads as fast


def few_rows_product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a · bᵀ → [M, N], as `products.product`."""
    if 0 < len(a_MK) <= SLAB and _suits(a_MK, b_NK) and (len(a_MK) <= 2 or b_NK.numel() <= SMALL_WEIGHT):
        return narrow_product(a_MK, b_NK)
    return product(a_MK, b_NK)


def few_rows_grouped_product(x_RK: Tensor, weight_ENK: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows sorted by expert, each block times its expert's weightᵀ → [R, N], as `products.grouped_product`."""
    most = len(counts) * (MEAN_ROWS if torch.get_num_threads() > 1 else SLAB)
    if len(counts) == 1 or len(x_RK) > most or not _suits(x_RK, weight_ENK, (torch.bfloat16,)):
        return grouped_product(x_RK, weight_ENK, counts)
    if 2 * sum(count > 0 for count in counts) >= len(counts) > 0:  # else weights would be read for nothing
        out_RN, todo = batched_product(x_RK, weight_ENK, counts, batch_height(counts))
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


def batch_height(counts: Sequence[int]) -> int:
    """Rows that every expert gets in a batched product: those of the fullest, but not beyond twice the mean."""
    mean = sum(counts) / len(counts)
    if mean <= SLAB:
        return SLAB
    return -(-min(max(counts), int(2 * mean)) // SLAB) * SLAB


def batched_product(
    x_RK: Tensor, weight_ENK: Tensor, counts: Sequence[int], height: int
) -> tuple[Tensor, list[tuple[int, slice]]]:
    """Rows sorted by expert times its weightᵀ → [R, N], and which rows of which experts are still missing in it."""
    places: list[int] = []
    rows: list[int] = []
    missing: list[tuple[int, slice]] = []
    start = 0
    for expert, count in enumerate(counts):
        taken = min(count, height)
        places += range(expert * height, expert * height + taken)
        rows += range(start, start + taken)
        if count > height:
            missing.append((expert, slice(start + height, start + count)))
        start += count
    E, N, K = weight_ENK.shape
    place_R = torch.tensor(places)
    slabs_XK = x_RK.new_zeros(E * height, K)
    if not missing:
        slabs_XK[place_R] = x_RK
        return _slabs(slabs_XK.view(E, height, K), weight_ENK).view(E * height, N)[place_R], missing
    row_R = torch.tensor(rows)
    slabs_XK[place_R] = x_RK[row_R]
    out_RN = x_RK.new_empty(len(x_RK), N)
    out_RN[row_R] = _slabs(slabs_XK.view(E, height, K), weight_ENK).view(E * height, N)[place_R]
    return out_RN, missing


def _slabs(slabs_ESK: Tensor, weight_ENK: Tensor) -> Tensor:
    """[E, S, N]. BF16 is oneDNN's; that, and more rows, are fastest the usual way round."""
    if slabs_ESK.dtype == torch.bfloat16 or slabs_ESK.shape[1] > SLAB:
        return torch.bmm(slabs_ESK, weight_ENK.mT)
    return torch.bmm(weight_ENK, slabs_ESK.mT).mT.contiguous()


def _suits(x: Tensor, weight: Tensor, more: tuple[torch.dtype, ...] = ()) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64, *more) and weight.is_contiguous()
