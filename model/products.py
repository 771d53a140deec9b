"""Matrix products by the fastest library at hand: torch's own, or oneDNN where it is on a CPU.

torch multiplies FP32 matrices on a CPU with MKL, which on some AMD processors reaches half of what oneDNN does
(measured by benchmarks/model.py, "share of the GEMM peak"). For BF16 both are oneDNN. Results differ in rounding only.

oneDNN generates code for every new shape, in about the time of a small product. A dense layer's shapes repeat; an
expert's number of rows is new every time. Its products are therefore made for a multiple of `ROW_STEP` rows: the rows
too many are those of the next expert, or zeros, and their results are dropped, so nothing is padded in memory.

On a CUDA device BF16 products of all experts are one launch of torch's grouped GEMM; that was tested on the CPU alone.
On a CPU it is our loop, since torch's grouped GEMM is one too, without the tricks above (benchmarks/grouped.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cpu.kernels import kernels, suits

ROW_STEP = 32
WIDTH_STEP = 16  # our kernels: what widths must be multiples of
FEW_ROWS = 8  # up to which MKL is the faster one, as generation wants it: a few rows per expert


def product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a · bᵀ → [M, N]. Either may be a transposed view. With a batch dimension before: torch's own."""
    if a_MK.dim() > 2 or len(a_MK) <= FEW_ROWS or not calls_onednn(a_MK) or 0 in (*a_MK.shape, *b_NK.shape):
        return a_MK @ b_NK.mT  # the last: oneDNN refuses empty operands
    if not (b_NK.is_contiguous() or b_NK.t().is_contiguous()):
        b_NK = b_NK.contiguous()  # for any other layout oneDNN falls back to plain loops
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")


def outer(a_TM: Tensor, b_TN: Tensor) -> Tensor:
    """aᵀ · b → [M, N], maybe as a transposed view: oneDNN copies its first operand, so that is the narrower one."""
    if calls_onednn(a_TM) and a_TM.dim() == 2 and a_TM.shape[1] > b_TN.shape[1]:
        return product(b_TN.t(), a_TM.t()).t()
    return product(a_TM.mT, b_TN.mT)


def calls_onednn(x: Tensor) -> bool:
    """Whether products of x go to oneDNN past torch, which would take MKL."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def generates_code(x: Tensor) -> bool:
    """Whether products of x are oneDNN's, be it through torch: they are for BF16."""
    return calls_onednn(x) or (x.device.type == "cpu" and x.dtype == torch.bfloat16)


def grouped_product(x_RK: Tensor, weight_ENK: Tensor, counts: Sequence[int], compiled: bool = False) -> Tensor:
    """Rows sorted by expert, `counts[e]` of them for expert e, each block times its expert's weightᵀ → [R, N]."""
    if compiled and _suits_kernel(x_RK, weight_ENK) and weight_ENK.dtype == x_RK.dtype:
        return cast(Tensor, kernels().grouped_product(x_RK.contiguous(), weight_ENK.transpose(1, 2), list(counts)))
    if has_grouped_kernel(x_RK, weight_ENK):
        return grouped_kernel(x_RK, weight_ENK, counts)
    out_RN = x_RK.new_empty(x_RK.shape[0], weight_ENK.shape[1])
    for expert, rows in blocks(counts):
        size = rows.stop - rows.start
        if size > FEW_ROWS and generates_code(x_RK):
            more = slice(rows.start, min(x_RK.shape[0], rows.start + _round_up(size)))
            out_RN[rows] = product(x_RK[more], weight_ENK[expert])[:size]
        else:
            torch.mm(x_RK[rows], weight_ENK[expert].t(), out=out_RN[rows])
    return out_RN


def add_grouped_weight_grads(
    grad_ENK: Tensor, dy_RN: Tensor, x_RK: Tensor, counts: Sequence[int], compiled: bool = False, fresh: bool = False
) -> None:
    """grad[e] += dyᵀ · x over the rows of expert e, for every expert that has any; what a fresh one holds is lost."""
    if compiled and _suits_kernel(x_RK, grad_ENK) and grad_ENK.dtype == torch.float32 and grad_ENK.is_contiguous():
        kernels().add_grouped_weight_grads(grad_ENK, dy_RN.contiguous(), x_RK.contiguous(), list(counts), fresh)
        return
    if fresh:
        grad_ENK.zero_()
    if has_grouped_kernel(x_RK, grad_ENK):
        add_weight_grads_by_kernel(grad_ENK, dy_RN, x_RK, counts)
        return
    for expert, rows in blocks(counts):
        dy, x = dy_RN[rows], x_RK[rows]
        size = rows.stop - rows.start
        if generates_code(x_RK) and size % ROW_STEP:
            dy, x = _with_zeros(dy), _with_zeros(x)
        add_weight_grad(grad_ENK[expert], dy, x)


def _suits_kernel(x_RK: Tensor, weight_ENK: Tensor) -> bool:
    """Whether our C++ kernels (`compiled`) take these: FP32 or BF16 on a CPU, dense, of widths that fill vectors."""
    dense = weight_ENK.is_contiguous() or weight_ENK.mT.is_contiguous()
    return dense and suits(x_RK) and not any(width % WIDTH_STEP for width in weight_ENK.shape[1:])


def has_grouped_kernel(x_RK: Tensor, weight_ENK: Tensor) -> bool:
    """Whether torch's grouped GEMM takes these: BF16, compute capability 8 or later, rows of a multiple of 16 bytes."""
    if x_RK.device.type != "cuda" or x_RK.dtype != torch.bfloat16 or any(size % 8 for size in weight_ENK.shape[1:]):
        return False
    return torch.cuda.get_device_capability(x_RK.device) >= (8, 0)


def grouped_kernel(x_RK: Tensor, weight_ENK: Tensor, counts: Sequence[int]) -> Tensor:
    """`grouped_product` as one launch."""
    if not len(x_RK):
        return x_RK.new_empty(0, weight_ENK.shape[1])
    return F.grouped_mm(x_RK, weight_ENK.transpose(1, 2), offs=_ends(counts, x_RK.device))


def add_weight_grads_by_kernel(grad_ENK: Tensor, dy_RN: Tensor, x_RK: Tensor, counts: Sequence[int]) -> None:
    """`add_grouped_weight_grads` as one launch; what it returns for experts without rows is not read."""
    used = [expert for expert, _ in blocks(counts)]
    if not used:
        return
    sums_ENK = F.grouped_mm(dy_RN.t(), x_RK, offs=_ends(counts, x_RK.device))
    if len(used) == len(counts):
        grad_ENK.add_(sums_ENK)
    else:
        index = torch.tensor(used, device=grad_ENK.device)
        grad_ENK.index_add_(0, index, sums_ENK[index].to(grad_ENK.dtype))


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    """Where each expert's rows end, as grouped_mm wants it."""
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


def add_weight_grad(grad_NK: Tensor, dy_TN: Tensor, x_TK: Tensor, compiled: bool = False, fresh: bool = False) -> None:
    """grad += dyᵀ · x, in the gradient's dtype; what a fresh one holds is lost."""
    if compiled and _suits_kernel(x_TK, grad_NK.unsqueeze(0)):
        add_grouped_weight_grads(grad_NK.unsqueeze(0), dy_TN, x_TK, [len(x_TK)], compiled, fresh)
        return
    if fresh:
        grad_NK.zero_()
    if grad_NK.dtype == dy_TN.dtype and not calls_onednn(dy_TN):
        grad_NK.addmm_(dy_TN.t(), x_TK)
    else:
        grad_NK.add_(outer(dy_TN, x_TK))


def blocks(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for every expert that has any."""
    for expert, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        if count:
            yield expert, slice(end - count, end)


def _round_up(rows: int) -> int:
    return -(-rows // ROW_STEP) * ROW_STEP


def _with_zeros(rows_RK: Tensor) -> Tensor:
    """The rows, and zeros up to the next multiple of ROW_STEP."""
    out = rows_RK.new_zeros(_round_up(len(rows_RK)), rows_RK.shape[1])
    out[: len(rows_RK)] = rows_RK
    return out
