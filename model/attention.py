"""Multi-head latent attention (report 2.1.1).

Keys and values are not computed from the hidden state but from a narrow latent vector per token, and queries from
another one. Only the latent (and one shared rotary key) would have to be cached when generating:

    c_q  = norm(x · W_qa)            query latent            [.., query_rank]
    q    = c_q · W_qb                per head: [nope | rope]  (rope part rotated)
    c_kv, k_rope = x · W_kva         key-value latent | rotary key shared by all heads
    k_nope | v   = norm(c_kv) · W_kvb

Attention is causal and stays inside each packed document (`model/attend.py`).

The queries, keys and values of all heads are many times wider than the latents that they come from. With
`recompute` backward makes them again from the latents instead of keeping them (report 3.2.3).

Shapes: B sequences, S positions, H heads, D hidden size; R rope_dim, Q = head_dim + R, V = value_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from model.attend import Documents, attend, attend_backward, document_ranges
from model.config import ModelConfig
from model.cpu.kernels import kernels, suits
from model.layers import Linear, RMSNorm, Toolbox
from model.rope import rotate_, softmax_scale


class AttentionContext:
    """What layers need to know of a micro-batch, computed once for all of a stage.

    sequence_scale   one over the sequences of the global batch, for the balance losses; 0 leaves them out
    parts            the sequences that attention works on at once, and their documents: one on a CPU, so that their
                     queries, keys and values stay in the cache; else all
    """

    def __init__(self, documents_BS: Tensor, cos: Tensor, sin: Tensor, sequence_scale: float = 0.0) -> None:
        self.sequence_scale = sequence_scale
        self._documents_BS = documents_BS
        self.cos, self.sin = cos, sin  # [B, S, rope_dim/2]
        sequences = range(len(documents_BS))
        one_by_one = documents_BS.device.type == "cpu"
        self.parts = [slice(b, b + 1) for b in sequences] if one_by_one else [slice(0, len(documents_BS))]
        self.documents = [Documents(documents_BS[part]) for part in self.parts]

    @cached_property
    def ranges(self) -> tuple[Tensor, Tensor]:
        """For each position the first one of its document, and the end: each [B, S]."""
        return document_ranges(self._documents_BS)


@dataclass(frozen=True)
class HeadSizes:
    """H heads; per head N channels without position, R rotary ones, V of values; scale of the scores.

    compiled   by our C++ kernels, where they take the heads
    """

    H: int
    N: int
    R: int
    V: int
    scale: float
    compiled: bool = False


class LatentAttention(nn.Module):
    def __init__(self, config: ModelConfig, tools: Toolbox) -> None:
        super().__init__()
        c = config
        self.config = c
        query_size = c.num_heads * (c.head_dim + c.rope_dim)
        if c.query_rank:
            self.query_down = Linear(c.hidden_size, c.query_rank, tools, "attention_query_down")
            self.query_norm = RMSNorm(c.query_rank, c.norm_eps, tools)
        self.query_up = Linear(c.query_rank or c.hidden_size, query_size, tools, "attention_query_up")
        latent_size = c.key_value_rank + c.rope_dim
        self.key_value_down = Linear(c.hidden_size, latent_size, tools, "attention_key_value_down")
        self.key_value_norm = RMSNorm(c.key_value_rank, c.norm_eps, tools)
        heads_size = c.num_heads * (c.head_dim + c.value_dim)
        self.key_value_up = Linear(c.key_value_rank, heads_size, tools, "attention_key_value_up")
        self.output = Linear(c.num_heads * c.value_dim, c.hidden_size, tools, "attention_output")
        self.sizes = HeadSizes(c.num_heads, c.head_dim, c.rope_dim, c.value_dim, softmax_scale(c), tools.compile)

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        c = self.config
        latent_q = self.query_down(x_BSD) if c.query_rank else x_BSD
        latent_kv, k_rope_BSR = self.key_value_down(x_BSD).split((c.key_value_rank, c.rope_dim), dim=-1)
        if c.recompute:
            return self.output(_FromLatents.apply(latent_q, latent_kv, k_rope_BSR, self, context))
        return self.output(_FromHeads.apply(*self.expand(latent_q, latent_kv), k_rope_BSR, self.sizes, context))

    def expand(self, latent_q: Tensor, latent_kv: Tensor) -> tuple[Tensor, Tensor]:
        """From latents to all heads: queries [B, S, H·Q], and keys without position beside values [B, S, H·(N+V)]."""
        normed_q = self.query_norm(latent_q) if self.config.query_rank else latent_q
        return self.query_up(normed_q), self.key_value_up(self.key_value_norm(latent_kv))


class _FromHeads(torch.autograd.Function):
    """Attention from the projected heads. Keeps these, in the dtype in which they came."""

    @staticmethod
    def forward(
        ctx: Any, q_up: Tensor, kv_up: Tensor, k_rope: Tensor, sizes: HeadSizes, context: AttentionContext
    ) -> Tensor:
        out, *rest = _forward(q_up, kv_up, k_rope, sizes, context)
        ctx.save_for_backward(q_up, kv_up, k_rope, *rest)
        ctx.sizes, ctx.context = sizes, context
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(dout, *ctx.saved_tensors, sizes=ctx.sizes, context=ctx.context), None, None)


class _FromLatents(torch.autograd.Function):
    """Attention from the latents. Keeps these alone, and projects them a second time in backward.

    The second projection is an ordinary part of the backward for the inputs: it happens once, and the weight
    gradients of the projections go to the queue from there, as those of any other layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        latent_q: Tensor,
        latent_kv: Tensor,
        k_rope: Tensor,
        attention: LatentAttention,
        context: AttentionContext,
    ) -> Tensor:
        out, *rest = _forward(*attention.expand(latent_q, latent_kv), k_rope, attention.sizes, context)
        ctx.save_for_backward(latent_q, latent_kv, k_rope, *rest)
        ctx.attention, ctx.context = attention, context
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        latent_q, latent_kv, k_rope, *rest = ctx.saved_tensors
        leaves = [latent.detach().requires_grad_() for latent in (latent_q, latent_kv)]
        with torch.enable_grad():
            q_up, kv_up = ctx.attention.expand(*leaves)
        dq_up, dkv_up, dk_rope = _backward(
            dout, q_up.detach(), kv_up.detach(), k_rope, *rest, sizes=ctx.attention.sizes, context=ctx.context
        )
        torch.autograd.backward((q_up, kv_up), (dq_up, dkv_up))
        return leaves[0].grad, leaves[1].grad, dk_rope, None, None


def _forward(
    q_up: Tensor, kv_up: Tensor, k_rope: Tensor, sizes: HeadSizes, context: AttentionContext
) -> tuple[Tensor, ...]:
    """The attention's output [B, S, H·V], and what backward needs besides the operands."""
    if sizes.compiled and suits(q_up):
        out, lse_BHS = kernels().attend(*_kernel_operands(q_up, kv_up, k_rope, sizes, context))
        return out, out, lse_BHS
    B, S, _ = q_up.shape
    out_BSHV = torch.empty(B, S, sizes.H, sizes.V, dtype=q_up.dtype, device=q_up.device)
    for part, documents in zip(context.parts, context.documents, strict=True):
        q, k, v = _assemble(q_up[part], kv_up[part], k_rope[part], sizes, context.cos[part], context.sin[part])
        out_BSHV[part] = attend(q, k, v, documents).transpose(1, 2)
    return (out_BSHV.flatten(2),)


def _kernel_operands(
    q_up: Tensor, kv_up: Tensor, k_rope: Tensor, sizes: HeadSizes, context: AttentionContext
) -> tuple[Any, ...]:
    tensors = (q_up, kv_up, k_rope, context.cos, context.sin, *context.ranges)
    return *(tensor.contiguous() for tensor in tensors), sizes.H, sizes.scale


def _backward(
    dout: Tensor,
    q_up: Tensor,
    kv_up: Tensor,
    k_rope: Tensor,
    *rest: Tensor,
    sizes: HeadSizes,
    context: AttentionContext,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the three operands; `rest` is what `_forward` wanted to be kept besides them."""
    if rest:
        operands = _kernel_operands(q_up, kv_up, k_rope, sizes, context)
        dq_up, dkv_up, turned_BHSR = kernels().attend_backward(dout.contiguous(), *rest, *operands)
        dk_rope = rotate_(turned_BHSR.sum(1), context.cos, -context.sin).to(k_rope.dtype)
        return dq_up, dkv_up, dk_rope
    H, N, V = sizes.H, sizes.N, sizes.V
    S = dout.shape[1]
    dq_up, dkv_up, dk_rope = torch.empty_like(q_up), torch.empty_like(kv_up), torch.empty_like(k_rope)
    for part, documents in zip(context.parts, context.documents, strict=True):
        cos, sin = context.cos[part], context.sin[part]
        q, k, v = _assemble(q_up[part], kv_up[part], k_rope[part], sizes, cos, sin)
        dout_BHSV = torch.empty_like(v).copy_(dout[part].view(-1, S, H, V).transpose(1, 2))
        dq, dk, dv = attend_backward(dout_BHSV, q, k, v, documents)
        rotate_(dq[..., N:], cos.unsqueeze(1), -sin.unsqueeze(1))
        dq *= sizes.scale
        dq_up[part].view(-1, S, H, q.shape[-1]).copy_(dq.transpose(1, 2))
        dk_rope[part] = rotate_(dk[..., N:].sum(1).contiguous(), cos, -sin)
        dkv_BSHX = dkv_up[part].view(-1, S, H, N + V)
        dkv_BSHX[..., :N] = dk[..., :N].transpose(1, 2)
        dkv_BSHX[..., N:] = dv.transpose(1, 2)
    return dq_up, dkv_up, dk_rope


def _assemble(
    q_up: Tensor, kv_up: Tensor, k_rope: Tensor, sizes: HeadSizes, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled and rotated queries, rotated keys, values: each [B, H, S, …]; on a CPU the first two in FP32 or better."""
    H, N, R, V = sizes.H, sizes.N, sizes.R, sizes.V
    B, S, _ = q_up.shape
    dtype = torch.promote_types(q_up.dtype, torch.float32) if q_up.device.type == "cpu" else q_up.dtype
    q = torch.empty(B, H, S, N + R, dtype=dtype, device=q_up.device)
    q.copy_(q_up.view(B, S, H, N + R).transpose(1, 2)).mul_(sizes.scale)
    rotate_(q[..., N:], cos.unsqueeze(1), sin.unsqueeze(1))
    keys, values = kv_up.view(B, S, H, N + V).transpose(1, 2).split((N, V), dim=-1)
    k = torch.empty_like(q)
    k[..., :N] = keys
    k[..., N:] = rotate_(k_rope.to(dtype, copy=True), cos, sin).unsqueeze(1)
    return q, k, values.contiguous()
