"""Multi-head latent attention (report 2.1.1).

Keys and values are not computed from the hidden state but from a narrow latent vector per token, and queries from
another one. Only the latent (and one shared rotary key) would have to be cached when generating:

    c_q  = norm(x · W_qa)            query latent            [.., query_rank]
    q    = c_q · W_qb                per head: [nope | rope]  (rope part rotated)
    c_kv, k_rope = x · W_kva         key-value latent | rotary key shared by all heads
    k_nope | v   = norm(c_kv) · W_kvb

Attention is causal and stays inside each packed document.

Shapes: B sequences, S positions, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import Linear, RMSNorm, Toolbox
from model.rope import rotate, softmax_scale


class AttentionContext:
    """What layers need to know of a micro-batch, computed once for all of a stage.

    sequence_scale   one over the sequences of the global batch, for the balance losses; 0 leaves them out
    """

    def __init__(self, documents_BS: Tensor, cos: Tensor, sin: Tensor, sequence_scale: float = 0.0) -> None:
        self.sequence_scale = sequence_scale
        same_document = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
        self.mask_B1SS = same_document.tril().unsqueeze(1)
        self.cos, self.sin = cos, sin  # [B, S, rope_dim/2]


class LatentAttention(nn.Module):
    def __init__(self, config: ModelConfig, tools: Toolbox) -> None:
        super().__init__()
        c = config
        self.config = c
        query_size = c.num_heads * (c.head_dim + c.rope_dim)
        if c.query_rank:
            self.query_down = Linear(c.hidden_size, c.query_rank, tools)
            self.query_norm = RMSNorm(c.query_rank, c.norm_eps, tools)
        self.query_up = Linear(c.query_rank or c.hidden_size, query_size, tools)
        self.key_value_down = Linear(c.hidden_size, c.key_value_rank + c.rope_dim, tools)
        self.key_value_norm = RMSNorm(c.key_value_rank, c.norm_eps, tools)
        self.key_value_up = Linear(c.key_value_rank, c.num_heads * (c.head_dim + c.value_dim), tools)
        self.scale = softmax_scale(c)
        self.output = Linear(c.num_heads * c.value_dim, c.hidden_size, tools)

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        c = self.config
        B, S, _ = x_BSD.shape
        latent = self.query_norm(self.query_down(x_BSD)) if c.query_rank else x_BSD
        q = self.query_up(latent).view(B, S, c.num_heads, c.head_dim + c.rope_dim)
        q_nope, q_rope = q.split((c.head_dim, c.rope_dim), dim=-1)
        latent_kv, k_rope = self.key_value_down(x_BSD).split((c.key_value_rank, c.rope_dim), dim=-1)
        kv = self.key_value_up(self.key_value_norm(latent_kv)).view(B, S, c.num_heads, c.head_dim + c.value_dim)
        k_nope, v = kv.split((c.head_dim, c.value_dim), dim=-1)

        cos, sin = context.cos.unsqueeze(2), context.sin.unsqueeze(2)
        q_rope = rotate(q_rope, cos, sin)
        k_rope = rotate(k_rope.unsqueeze(2), cos, sin).expand(-1, -1, c.num_heads, -1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        out = _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), context.mask_B1SS, self.scale)
        return self.output(out.transpose(1, 2).reshape(B, S, c.num_heads * c.value_dim))


def _attend(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, mask_B1SS: Tensor, scale: float) -> Tensor:
    """Softmax attention. Torch's fused kernel wants values as wide as queries, so they are padded with zeros."""
    value_dim, query_dim = v_BHSV.shape[-1], q_BHSQ.shape[-1]
    v = F.pad(v_BHSV, (0, max(0, query_dim - value_dim)))
    return F.scaled_dot_product_attention(q_BHSQ, k_BHSQ, v, attn_mask=mask_B1SS, scale=scale)[..., :value_dim]
