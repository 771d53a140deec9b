"""The attention core: softmax(q · kᵀ) · v, causal, inside each packed document; memory linear in the sequence.

One seam, two ways behind it:

- on a CPU, blocks of queries against the keys that they may see, with the products of `model/products.py`. Torch's own
  fused kernel for CPUs multiplies with MKL and skips nothing of a masked block. Scores are FP32 (FP64 for FP64) and
  are made again in backward, so nothing of size S² is kept.
- elsewhere torch's kernels: flash attention over documents of unequal length on a CUDA device in 16 bits, else
  `scaled_dot_product_attention` with a mask. On the meta device, where a dry run counts what a GPU would keep and
  compute, flash attention as well.

Shapes: B sequences, S positions, H heads, Q width of queries and keys, V of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from model.products import product

ROWS = 256  # queries per block: scores of one head and block stay in the cache


@dataclass(frozen=True)
class Block:
    """Some queries of one sequence and the keys that any of them may see; `hidden` masks the last of these keys."""

    rows: slice
    keys: slice
    hidden: Tensor


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


def _blocks(documents_S: Tensor) -> Iterator[Block]:
    length = len(documents_S)
    index = torch.arange(length)
    changes = torch.ones(length, dtype=torch.bool)
    changes[1:] = documents_S[1:] != documents_S[:-1]
    first_S = torch.where(changes, index, 0).cummax(0).values  # where each position's document starts
    for start in range(0, length, ROWS):
        end = min(start + ROWS, length)
        first = int(first_S[start])
        if documents_S[start] == documents_S[end - 1]:
            hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        else:
            other = documents_S[start:end, None] != documents_S[None, first:end]
            hidden = other | (index[start:end, None] < index[None, first:end])
        yield Block(slice(start, end), slice(first, end), hidden)


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
        for h in range(q.shape[1]):
            p = _probabilities(q[b, h, block.rows], k[b, h, block.keys], block.hidden)
            out[b, h, block.rows] = product(p, v[b, h, block.keys].t())
    return out


def _backward_in_blocks(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Documents
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for b, block in _each(documents):
        rows, keys = block.rows, block.keys
        for h in range(q.shape[1]):
            q_rows, k_keys, dout_rows = q[b, h, rows], k[b, h, keys], dout[b, h, rows]
            p = _probabilities(q_rows, k_keys, block.hidden)
            dp = product(dout_rows, v[b, h, keys])
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq[b, h, rows] = product(ds, k_keys.t())
            dk[b, h, keys] += product(ds.t(), q_rows.t())
            dv[b, h, keys] += product(p.t(), dout_rows.t())
    return dq, dk, dv


def _each(documents: Documents) -> Iterator[tuple[int, Block]]:
    for b, row in enumerate(documents.blocks):
        for block in row:
            yield b, block


def _probabilities(q_RQ: Tensor, k_KQ: Tensor, hidden: Tensor) -> Tensor:
    scores_RK = product(q_RQ, k_KQ)
    scores_RK[:, -hidden.shape[1] :].masked_fill_(hidden, float("-inf"))
    return scores_RK.softmax(-1)


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
