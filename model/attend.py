"""The attention core: softmax(q · kᵀ) · v, causal, inside each packed document; memory linear in the sequence.

One seam, two ways behind it:

- on a CPU, blocks of queries against the keys that they may see, with the products of `model/products.py`. Torch's own
  fused kernel for CPUs multiplies with MKL and skips nothing of a masked block. Queries, keys, scores and softmax are
  FP32 (FP64 for FP64), the other products have the dtype of the values. Scores are made again in backward, so nothing
  of size S² is kept.
- elsewhere torch's kernels: flash attention over documents of unequal length on a CUDA device in 16 bits, else
  `scaled_dot_product_attention` with a mask. On the meta device, where a dry run counts what a GPU would keep and
  compute, flash attention as well.

Shapes: B sequences, S positions, H heads, Q width of queries and keys, V of values; R queries and K keys of a block
(of one head or, where one product does several, with a dimension of heads before).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from model.products import calls_onednn, outer, product

ROWS = 256  # queries per block: scores of one head and block stay in the cache
SCORES = 1 << 20  # scores of several heads that are worked on at once


@dataclass(frozen=True)
class Block:
    """Some queries of one sequence and the keys that any of them may see.

    `mask` is added to their scores with the last of these keys: 0, or −∞ where a query must not see the key.
    """

    rows: slice
    keys: slice
    mask: Tensor


class Documents:
    """Where the documents of a micro-batch lie, in the forms that the kernels want; each is made when asked for."""

    def __init__(self, documents_BS: Tensor) -> None:
        self.documents_BS = documents_BS

    @cached_property
    def blocks(self) -> list[list[Block]]:
        """For each sequence, its queries in blocks, without keys of earlier documents."""
        return [list(_blocks(row)) for row in self.documents_BS.cpu()]

    @cached_property
    def mask_B1SS(self) -> Tensor:
        same_BSS = self.documents_BS.unsqueeze(2) == self.documents_BS.unsqueeze(1)
        return same_BSS.tril().unsqueeze(1)

    @cached_property
    def borders(self) -> tuple[Tensor, int]:
        """First positions of all documents and the end, int32, in the B·S tokens laid end to end; longest length."""
        starts_BS = torch.ones_like(self.documents_BS, dtype=torch.bool)
        starts_BS[:, 1:] = self.documents_BS[:, 1:] != self.documents_BS[:, :-1]
        starts = starts_BS.flatten().nonzero().flatten()
        borders = torch.cat((starts, starts.new_tensor([starts_BS.numel()]))).to(torch.int32)
        return borders, int(borders.diff().max())


def document_ranges(documents_BS: Tensor) -> tuple[Tensor, Tensor]:
    """For each position the first one of its document, and the end (the next document's first): each [B, S]."""
    S = documents_BS.shape[1]
    position_S = torch.arange(S, device=documents_BS.device)
    changes_BX = documents_BS[:, 1:] != documents_BS[:, :-1]
    first_BS = F.pad(position_S[1:].where(changes_BX, 0), (1, 0)).cummax(1).values
    end_BS = F.pad(position_S[1:].where(changes_BX, S), (0, 1), value=S).flip(1).cummin(1).values.flip(1)
    return first_BS, end_BS


def _blocks(documents_S: Tensor) -> Iterator[Block]:
    length = len(documents_S)
    index = torch.arange(length)
    changes = torch.ones(length, dtype=torch.bool)
    changes[1:] = documents_S[1:] != documents_S[:-1]
    first_S = torch.where(changes, index, 0).cummax(0).values  # where each position's document starts
    causal_RR = torch.full((min(ROWS, length),) * 2, float("-inf")).triu(1)
    for start in range(0, length, ROWS):
        end = min(start + ROWS, length)
        first = int(first_S[start])
        if documents_S[start] == documents_S[end - 1]:
            mask = causal_RR[: end - start, : end - start]
        else:
            other = documents_S[start:end, None] != documents_S[None, first:end]
            hidden = other | (index[start:end, None] < index[None, first:end])
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        yield Block(slice(start, end), slice(first, end), mask)


def attend(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, documents: Documents) -> Tensor:
    """softmax(q · kᵀ) · v → [B, H, S, V]. Queries come multiplied with the scale; nothing here is differentiable."""
    if q_BHSQ.device.type == "cpu":
        return _attend_in_blocks(q_BHSQ, k_BHSQ, v_BHSV, documents)
    return _attend_fused(q_BHSQ, k_BHSQ, v_BHSV, documents)


def attend_backward(
    dout_BHSV: Tensor, q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, documents: Documents
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v. Runs the forward again rather than keep its scores."""
    if q_BHSQ.device.type == "cpu":
        return _backward_in_blocks(dout_BHSV, q_BHSQ, k_BHSQ, v_BHSV, documents)
    leaves = [t.detach().requires_grad_() for t in (q_BHSQ, k_BHSQ, v_BHSV)]
    with torch.enable_grad():
        out = _attend_fused(leaves[0], leaves[1], leaves[2], documents)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout_BHSV)
    return dq, dk, dv


# -- on a CPU ----------------------------------------------------------------------------------------------------------


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    out = torch.empty_like(v)
    for b, block in _each(documents):
        of_rows, of_keys = (q[b], out[b]), (k[b], v[b])
        for q_RQ, out_RV, k_KQ, v_KV in _heads(block, of_rows, of_keys, v.dtype):
            out_RV.copy_(product(_probabilities(q_RQ, k_KQ, block.mask, v.dtype), v_KV.mT))
    return out


def _backward_in_blocks(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Documents
) -> tuple[Tensor, Tensor, Tensor]:
    low_q, low_k = q.to(v.dtype), k.to(v.dtype)
    dq, dk, dv = torch.empty_like(q), _sums(k, v.dtype), _sums(v, v.dtype)
    for b, block in _each(documents):
        of_rows, of_keys = (dout[b], q[b], low_q[b], dq[b]), (k[b], low_k[b], v[b], dk[b], dv[b])
        for dout_RV, q_RQ, lq_RQ, dq_RQ, k_KQ, lk_KQ, v_KV, dk_KQ, dv_KV in _heads(block, of_rows, of_keys, v.dtype):
            p_RK = _probabilities(q_RQ, k_KQ, block.mask, v.dtype)
            ds_RK = torch.ops.aten._softmax_backward_data(product(dout_RV, v_KV), p_RK, -1, p_RK.dtype)
            dq_RQ.copy_(product(ds_RK, lk_KQ.mT))
            dk_KQ.add_(outer(ds_RK, lq_RQ))
            dv_KV.add_(outer(p_RK, dout_RV))
    return dq, _row_by_row(dk), _row_by_row(dv)


def _each(documents: Documents) -> Iterator[tuple[int, Block]]:
    for b, row in enumerate(documents.blocks):
        for block in row:
            yield b, block


def _heads(
    block: Block, of_rows: Sequence[Tensor], of_keys: Sequence[Tensor], dtype: torch.dtype
) -> Iterator[tuple[Tensor, ...]]:
    """The block's part of each tensor [H, S, ·]: head by head for oneDNN, else as many heads as suit one product."""
    parts = [t[:, block.rows] for t in of_rows] + [t[:, block.keys] for t in of_keys]
    if calls_onednn(parts[0].new_empty(0, dtype=dtype)):
        return zip(*(part.unbind() for part in parts), strict=True)
    scores = parts[0].shape[1] * parts[-1].shape[1]
    return zip(*(part.split(max(1, SCORES // scores)) for part in parts), strict=True)


def _probabilities(q_RQ: Tensor, k_KQ: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax(q · kᵀ + mask) in `dtype`: [R, K], or [heads, R, K] of several heads."""
    if q_RQ.dim() == 3 and calls_onednn(q_RQ):
        p_HRK = q_RQ.new_empty(*q_RQ.shape[:2], k_KQ.shape[1], dtype=dtype)
        for p_RK, q_head, k_head in zip(p_HRK.unbind(), q_RQ.unbind(), k_KQ.unbind(), strict=True):
            p_RK.copy_(_probabilities(q_head, k_head, mask, q_head.dtype))
        return p_HRK
    scores_RK = product(q_RQ, k_KQ)
    scores_RK[..., -mask.shape[1] :].add_(mask)
    return scores_RK.softmax(-1)


def _sums(x: Tensor, low: torch.dtype) -> Tensor:
    """Zeros to add up the results of `outer` in, in FP32 or better and in the layout in which oneDNN gives them."""
    dtype = torch.promote_types(low, torch.float32)
    if calls_onednn(x.new_empty(0, dtype=low)):
        return x.new_zeros(x.mT.shape, dtype=dtype).mT
    return torch.zeros_like(x, dtype=dtype)


def _row_by_row(x_BHSQ: Tensor) -> Tensor:
    """The same with the channels of a head next to each other."""
    if x_BHSQ.stride(-1) == 1:
        return x_BHSQ
    B, H, S, Q = x_BHSQ.shape
    rows_BSX = torch.stack([x_HQS.flatten(0, 1).t().contiguous() for x_HQS in x_BHSQ.mT])
    return rows_BSX.view(B, S, H, Q).transpose(1, 2)


# -- elsewhere ---------------------------------------------------------------------------------------------------------


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Torch's kernels want values as wide as queries, so values are padded with zeros."""
    width = v.shape[-1]
    padded = F.pad(v, (0, max(0, q.shape[-1] - width)))
    if q.device.type == "meta":
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, padded, 0.0, True, scale=1.0)[0][..., :width]
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and width <= q.shape[-1]:
        return _attend_varlen(q, k, padded, documents)[..., :width]
    return F.scaled_dot_product_attention(q, k, padded, attn_mask=documents.mask_B1SS, scale=1.0)[..., :width]


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    B, _, S, _ = q.shape
    borders, longest = documents.borders
    flat_q, flat_k, flat_v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    out = varlen_attn(flat_q, flat_k, flat_v, borders, borders, longest, longest, scale=1.0, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out.view(B, S, *out.shape[1:]).transpose(1, 2)
