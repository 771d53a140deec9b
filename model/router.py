"""Which experts does a token go to? Sigmoid scores, node-limited groups, a bias instead of an auxiliary loss.

    score   = sigmoid(x · W)                                    affinity of a token to each expert, in FP32
    choose  by score + bias: the best groups (a group's score is the sum of its two best experts), then the best
            experts in those groups, so that a token visits at most `groups_per_token` nodes (report 2.1.2)
    gate    = score of the chosen, normalised to sum 1, × route_scale. The bias never enters the gate.

After each step the bias of an overloaded expert goes down by γ and that of an underloaded one up by γ (arXiv
2408.15664), from integer counts of the whole global batch: `record` adds up counts here, `parallel/balance.py` sums
them over ranks, `update_bias` moves the bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.balance import Counts, count, routing_loss, uniform_experts, with_gradient_of
from model.config import ModelConfig
from model.cpu.kernels import kernels, suits
from model.layers import Linear, Toolbox
from model.precision import CastPrecision


class Routing(NamedTuple):
    """gates_TK (at least FP32), experts_TK (int64), and counts_C of this micro-batch, to be handed to `record`."""

    gates_TK: Tensor
    experts_TK: Tensor
    counts_C: Tensor


class Router(nn.Module):
    """Buffers: bias_E (part of the checkpoint) and counts_C, int64, what was recorded since it was last cleared."""

    bias_E: Tensor
    counts_C: Tensor

    def __init__(self, config: ModelConfig, tools: Toolbox) -> None:
        super().__init__()
        self.config, self.balance, self.cpp = config, tools.balance, tools.cpp or tools.compile
        high = Toolbox(CastPrecision(tools.param_dtype), tools.queue, tools.dispatcher, tools.param_dtype, tools.device)
        self.linear = Linear(config.hidden_size, config.num_experts, high, "router")
        self.register_buffer("bias_E", torch.zeros(config.num_experts, dtype=tools.param_dtype, device=tools.device))
        width = Counts.width(config.num_experts, config.num_groups)
        counts = torch.zeros(width, dtype=torch.int64, device=tools.device)
        self.register_buffer("counts_C", counts, persistent=False)

    def forward(self, x_TD: Tensor, sequences: int = 1, loss_scale: float = 0.0) -> Routing:
        """Route T tokens that make `sequences` sequences of equal length.

        loss_scale   one over the sequences of the global batch: what the balance losses are multiplied by. Their
                     gradient flows into the scores with that of the gates; they are no part of the token loss.

        Changes nothing, so it may be computed again in a backward: `record` is called once per micro-batch.
        """
        return self.weigh(*self.choose(x_TD), sequences, loss_scale)

    def choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """scores_TE and experts_TK: all that dispatch must know before it can ask how many tokens come."""
        scores_TE = torch.sigmoid(self.linear(x_TD.to(self.linear.weight.dtype)))
        return scores_TE, self._choose(scores_TE.detach())

    def weigh(self, scores_TE: Tensor, experts_TK: Tensor, sequences: int = 1, loss_scale: float = 0.0) -> Routing:
        """The rest: gates, balance losses and counts. It runs under dispatch's exchange of sizes."""
        c = self.config
        gates_TK = self.gates(scores_TE, experts_TK)
        pulled_TE = scores_TE if self.balance.has_loss else scores_TE.detach()
        share_TE = pulled_TE / (pulled_TE.sum(-1, keepdim=True) + 1e-20)
        loss = routing_loss(self.balance, share_TE, experts_TK, sequences, loss_scale)
        if loss.requires_grad:
            gates_TK = with_gradient_of(loss, gates_TK)
        return Routing(gates_TK, experts_TK, count(experts_TK, share_TE, c.num_groups, loss))

    def gates(self, scores_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """[T, K]: the weights of the chosen experts."""
        chosen_TK = scores_TE.gather(1, experts_TK)
        return chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 1e-20) * self.config.route_scale

    def record(self, counts_C: Tensor) -> None:
        """Add the counts of one micro-batch."""
        self.counts_C += counts_C

    def _choose(self, scores_TE: Tensor) -> Tensor:
        c = self.config
        if self.balance.force == "uniform":
            sizes = (c.num_experts, c.experts_per_token, c.num_groups, c.groups_per_token)
            return uniform_experts(len(scores_TE), *sizes, scores_TE.device)
        biased_TE, limits = scores_TE + self.bias_E, (c.num_groups, c.groups_per_token, c.experts_per_token)
        if self.cpp and suits(biased_TE) and biased_TE.dtype == torch.float32:
            chosen_TK: Tensor = kernels().choose_experts(biased_TE, *limits)
            return chosen_TK
        return choose_experts(biased_TE, *limits)


def choose_experts(biased_TE: Tensor, groups: int, groups_per_token: int, experts_per_token: int) -> Tensor:
    """Node-limited top-k → [T, K]. Ties go to the lower index (stable sort), so every device chooses alike."""
    if groups_per_token < groups:
        T, E = biased_TE.shape
        per_group = biased_TE.view(T, groups, E // groups)
        group_scores = per_group.topk(min(2, E // groups), dim=-1).values.sum(-1)
        kept = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, :groups_per_token]
        closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
        biased_TE = per_group.masked_fill(closed.unsqueeze(-1), float("-inf")).view(T, E)
    return biased_TE.sort(dim=-1, descending=True, stable=True).indices[:, :experts_per_token]
