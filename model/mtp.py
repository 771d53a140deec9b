"""Multi-token prediction (report 2.2): module k predicts one token further than module k−1, from the same position.

    x   = [norm(embedding of token i+k) | norm(hidden of k−1 at i)] · W      2·D → D
    out = layer(x)                     one transformer layer of its own
    hidden = norm(out)                 goes to the shared output head, and to module k+1

Module 0 is the main model, and its hidden state is the one after the final norm, as in the published checkpoint and
the programs that serve it. The embedding and the output head are those of the main model: the same tensors where one
rank holds both, else a copy of the embedding on the last stage (parallel/grads.py adds up their gradients).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention import AttentionContext
from model.config import ModelConfig
from model.layer import Layer, Residual, SegmentWriter
from model.layers import Embedding, Linear, RMSNorm, Toolbox


class MTPModule(nn.Module):
    """depth: 1 for the module that predicts the token after the next one; experts: the range on this rank."""

    def __init__(self, config: ModelConfig, depth: int, experts: range, tools: Toolbox) -> None:
        super().__init__()
        self.label = f"mtp.{depth}"
        self.embedding_norm = RMSNorm(config.hidden_size, config.norm_eps, tools)
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps, tools)
        self.projection = Linear(2 * config.hidden_size, config.hidden_size, tools, "mtp_projection")
        self.layer = Layer(config, config.num_layers + depth - 1, experts, tools, self.label)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, tools)

    def write(
        self, out: SegmentWriter, hidden: str, tokens_BS: Tensor, embedding: Embedding, context: AttentionContext
    ) -> Residual:
        """Append the module's segments up to its layer; `hidden` names the hidden state that it starts from."""
        merged = f"{self.label}.merged"
        out.compute(f"{self.label}.merge", (hidden,), (merged,), lambda h: self.merge(h, tokens_BS, embedding))
        return self.layer.write(out, (merged,), context)

    def merge(self, hidden: Tensor, tokens: Tensor, embedding: Embedding) -> Tensor:
        """What the layer sees of hidden states [..., D] and tokens [...]: [..., D]."""
        embedded = self.embedding_norm(embedding(tokens))
        return self.projection(torch.cat((embedded, self.hidden_norm(hidden)), dim=-1))
