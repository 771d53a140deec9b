"""Balance of the experts' load inside the model: the losses that ask for it, and the counts that show it.

Two losses, both Σ_i f_i · P_i over experts i (1 when perfectly balanced), with f_i = E/(K·S) × the number of the S
tokens that chose expert i, and P_i = the mean share of expert i in a token's scores:

    sequence   per sequence, f from the K highest scores alone: the report's complementary loss (2.1.2, eq. 17 to 20)
    batch      per micro-batch, f from the experts really used: the classic auxiliary loss, for comparison

Both are means over the sequences of the global batch, so their gradients add up over micro-batches and ranks like
those of the token loss.

Shapes: T tokens in B sequences of S, E experts, K of them per token, G groups (nodes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FORCES = ("none", "uniform")
# Entropies and losses are counted in integers too: their sum is then the same in any order.
_ENTROPY_UNIT, _LOSS_UNIT = 1e-6, 1e-12


@dataclass(frozen=True)
class Balance:
    """How routers are kept in balance besides their bias.

    sequence_loss   α of the sequence-wise loss; 0 leaves it out
    batch_loss      coefficient of the classic auxiliary loss; 0 leaves it out
    force           "uniform": ignore the scores and choose every expert equally often, for benchmarks; or "none"
    """

    sequence_loss: float = 0.0
    batch_loss: float = 0.0
    force: str = "none"

    @property
    def has_loss(self) -> bool:
        return self.sequence_loss > 0 or self.batch_loss > 0


NO_BALANCE = Balance()


def balance_loss(share_TE: Tensor, chosen_TK: Tensor, rows: int) -> Tensor:
    """Σ_i f_i · P_i, summed over `rows` runs of T/rows tokens. The gradient goes through the shares P alone."""
    T, E = share_TE.shape
    chosen_RN = chosen_TK.reshape(rows, -1)
    counts_RE = share_TE.new_zeros(rows, E).scatter_add_(1, chosen_RN, share_TE.new_ones(chosen_RN.shape))
    mean_RE = share_TE.view(rows, T // rows, E).mean(1)
    return (counts_RE * mean_RE).sum() * (E / chosen_RN.shape[1])


def routing_loss(balance: Balance, share_TE: Tensor, experts_TK: Tensor, sequences: int, scale: float) -> Tensor:
    """The balance losses of one router and micro-batch, times `scale`: one over the sequences of the global batch."""
    loss = share_TE.new_zeros(())
    if balance.sequence_loss:
        best_TK = share_TE.detach().topk(experts_TK.shape[1], dim=-1).indices
        loss = loss + balance.sequence_loss * scale * balance_loss(share_TE, best_TK, sequences)
    if balance.batch_loss:
        loss = loss + balance.batch_loss * scale * sequences * balance_loss(share_TE, experts_TK, 1)
    return loss


def with_gradient_of(loss: Tensor, carrier: Tensor) -> Tensor:
    """`carrier`, unchanged; whoever differentiates it also differentiates `loss`, with factor one.

    The loss arises in the middle of the network and on any rank; this spares it the way to the end.
    """
    return _WithGradientOf.apply(carrier, loss)


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, dcarrier: Tensor) -> tuple[Tensor, Tensor]:
        return dcarrier, torch.ones_like(ctx.like)


def uniform_experts(
    tokens: int, experts: int, experts_per_token: int, groups: int, groups_per_token: int, device: torch.device
) -> Tensor:
    """Perfectly balanced choices [T, K] within the node limit: token t uses groups t, t+1, … (mod G), round robin.

    Every token visits min(K, limit) groups, the most that it may. In each run of G tokens every group gets K
    choices, and inside a group its experts take turns, so loads differ by at most one when G divides T.
    """
    size, visited = experts // groups, min(experts_per_token, groups_per_token)
    place_K = torch.arange(experts_per_token, device=device) % visited  # which of its groups a slot uses
    order_K = place_K.argsort(stable=True).argsort()  # so that slots of one group take neighbouring turns
    position_TK = torch.arange(tokens, device=device).unsqueeze(1) + place_K
    position_TK %= -(-tokens // groups) * groups  # the last tokens' further groups go on with the first turns
    turn_TK = position_TK // groups * experts_per_token + order_K
    return position_TK % groups * size + turn_TK % size


@dataclass(frozen=True)
class Counts:
    """What L routers have counted: integers, [L, E + G + 3].

    load_LE     tokens that chose each expert
    visits_LG   tokens that chose at least one expert of each group, so travelled to that node
    tokens_L    tokens routed
    entropy_L   Σ over tokens of the entropy of their normalised scores, in nats
    loss_L      Σ of the scaled balance losses: their mean over the sequences of each global batch
    """

    rows_LC: Tensor
    experts: int
    groups: int

    @property
    def load_LE(self) -> Tensor:
        return self.rows_LC[:, : self.experts]

    @property
    def visits_LG(self) -> Tensor:
        return self.rows_LC[:, self.experts : self.experts + self.groups]

    @property
    def tokens_L(self) -> Tensor:
        return self.rows_LC[:, -3]

    @property
    def entropy_L(self) -> Tensor:
        return self.rows_LC[:, -2].double() * _ENTROPY_UNIT

    @property
    def loss_L(self) -> Tensor:
        return self.rows_LC[:, -1].double() * _LOSS_UNIT

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.rows_LC + other.rows_LC, self.experts, self.groups)

    @staticmethod
    def width(experts: int, groups: int) -> int:
        return experts + groups + 3


@torch.no_grad()
def count(experts_TK: Tensor, share_TE: Tensor, groups: int, loss: Tensor) -> Tensor:
    """One router's counts for one micro-batch, int64 [C] as in `Counts`."""
    T, E = share_TE.shape
    chosen = experts_TK.flatten()  # bincount would make a CUDA device's host wait for the largest of them
    load_E = torch.zeros(E, dtype=torch.int64, device=share_TE.device).scatter_add_(0, chosen, torch.ones_like(chosen))
    visited_TG = torch.zeros(T, groups, dtype=torch.bool, device=share_TE.device)
    visited_TG.scatter_(1, experts_TK // (E // groups), True)
    entropy = (torch.special.entr(share_TE).sum().double() / _ENTROPY_UNIT).round().long()
    fixed_loss = (loss.double() / _LOSS_UNIT).round().long()
    return torch.cat((load_E, visited_TG.sum(0), torch.stack((entropy.new_full((), T), entropy, fixed_loss))))


@torch.no_grad()
def update_bias(bias_LE: Tensor, load_LE: Tensor, rate: float) -> None:
    """bias += rate · sign(mean load − load), in place, for all layers L at once. Loads are integers.

    Comparing E·load with the total keeps the sign exact: a mean in floating point could round across it.
    """
    total_L1 = load_LE.sum(-1, keepdim=True)
    bias_LE += rate * torch.sign(total_L1 - load_LE.shape[-1] * load_LE).to(bias_LE.dtype)


def max_violation(load_LE: Tensor) -> Tensor:
    """MaxVio per layer: (largest load − mean load) / mean load (arXiv 2408.15664, section 3); 0 without load."""
    mean_L = load_LE.double().mean(-1)
    return (load_LE.amax(-1).double() - mean_L) / mean_L.clamp(min=1e-9)
