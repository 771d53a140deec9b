"""Which experts does a token go to? Sigmoid scores, node-limited groups, a bias instead of an auxiliary loss.

    score   = sigmoid(x · W)                                    affinity of a token to each expert, in FP32
    choose  by score + bias: the best groups (a group's score is the sum of its two best experts), then the best
            experts in those groups, so that a token visits at most `groups_per_token` nodes (report 2.1.2)
    gate    = score of the chosen, normalised to sum 1, × route_scale. The bias never enters the gate.

After each step the bias of an overloaded expert goes down by γ and that of an underloaded one up by γ (arXiv
2408.15664), from integer counts of the whole global batch: `load_E` counts here, `balance` updates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import Linear, Toolbox
from model.precision import CastPrecision


class Router(nn.Module):
    """Buffers: bias_E (part of the checkpoint) and load_E, the int64 token counts since they were last cleared."""

    bias_E: Tensor
    load_E: Tensor

    def __init__(self, config: ModelConfig, tools: Toolbox) -> None:
        super().__init__()
        self.config = config
        high = Toolbox(CastPrecision(tools.param_dtype), tools.queue, tools.dispatcher, tools.param_dtype, tools.device)
        self.linear = Linear(config.hidden_size, config.num_experts, high)
        self.register_buffer("bias_E", torch.zeros(config.num_experts, dtype=tools.param_dtype, device=tools.device))
        load = torch.zeros(config.num_experts, dtype=torch.int64, device=tools.device)
        self.register_buffer("load_E", load, persistent=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns gates_TK (at least FP32) and experts_TK (int64), and counts the load."""
        c = self.config
        scores_TE = torch.sigmoid(self.linear(x_TD.to(self.linear.weight.dtype)))
        experts_TK = choose_experts(
            scores_TE.detach() + self.bias_E, c.num_groups, c.groups_per_token, c.experts_per_token
        )
        chosen_TK = scores_TE.gather(1, experts_TK)
        gates_TK = chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 1e-20) * c.route_scale
        self.load_E += torch.bincount(experts_TK.flatten(), minlength=c.num_experts)
        return gates_TK, experts_TK


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


@torch.no_grad()
def update_bias(bias_LE: Tensor, load_LE: Tensor, rate: float) -> None:
    """bias += rate · sign(mean load − load), in place, for all layers L at once. Loads are integers.

    Comparing E·load with the total keeps the sign exact: a mean in floating point could round across it.
    """
    total_L1 = load_LE.sum(-1, keepdim=True)
    bias_LE += rate * torch.sign(total_L1 - load_LE.shape[-1] * load_LE).to(bias_LE.dtype)


def max_violation(load_LE: Tensor) -> Tensor:
    """MaxVio per layer: (largest load − mean load) / mean load (arXiv 2408.15664, section 3)."""
    mean_L = load_LE.double().mean(-1)
    return (load_LE.amax(-1).double() - mean_L) / mean_L.clamp(min=1e-9)
