"""The oracle: the same network as plain serial torch code under ordinary autograd.

Written from the report's formulas without anything from `model/`: no custom autograd, no segments, no dispatch; every
expert looks at every token. Parameters are leaves in a dict keyed by global names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]


class Oracle:
    """balance: coefficients of the sequence-wise balance loss, and of the one over a micro-batch.

    After `terms` or `loss`, `balance_loss` holds what these losses add to what is minimised.
    """

    def __init__(self, config: Any, params: Params, balance: tuple[float, float] = (0.0, 0.0)) -> None:
        self.c = config
        self.balance = balance
        self.balance_loss = torch.zeros(())
        self.routed: dict[str, list[tuple[Tensor, Tensor]]] = {}  # of one micro-batch: scores and choice by sequence
        self.params = {n: p.clone().requires_grad_() for n, p in params.items() if not n.endswith("bias_E")}
        self.biases = {n: p.clone() for n, p in params.items() if n.endswith("bias_E")}
        self.mtp_weight, self.z_weight = 0.3, 0.0
        self.loads = {n: torch.zeros(config.num_experts, dtype=torch.int64) for n in self.biases}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.params[name + ".weight"].T

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.c.norm_eps) * self.params[name + ".weight"]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [S, heads, dim]: as complex numbers."""
        dim = x.shape[-1]
        frequency = self.c.rope_base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        turn = torch.polar(torch.ones(1, dtype=torch.float64), positions.double()[:, None] * frequency)
        turned = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2)) * turn[:, None, :]
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)

    def attention(self, name: str, x: Tensor, documents: Tensor, positions: Tensor) -> Tensor:
        """x [S, D], one sequence."""
        c, S = self.c, len(x)
        latent = x
        if c.query_rank:
            latent = self.norm(name + ".query_norm", self.linear(name + ".query_down", x))
        q = self.linear(name + ".query_up", latent).view(S, c.num_heads, -1)
        down = self.linear(name + ".key_value_down", x)
        latent, k_rope = down[:, : c.key_value_rank], down[:, c.key_value_rank :]
        up = self.linear(name + ".key_value_up", self.norm(name + ".key_value_norm", latent)).view(S, c.num_heads, -1)
        q = torch.cat((q[..., : c.head_dim], self.rotate(q[..., c.head_dim :], positions)), -1)
        k_rope = self.rotate(k_rope[:, None], positions).expand(S, c.num_heads, c.rope_dim)
        k = torch.cat((up[..., : c.head_dim], k_rope), -1)
        scores = torch.einsum("shd,thd->hst", q, k) / (c.head_dim + c.rope_dim) ** 0.5
        seen = (documents[:, None] == documents[None, :]) & torch.ones(S, S).tril().bool()
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out = torch.einsum("hst,thd->shd", weights, up[..., c.head_dim :]).reshape(S, -1)
        return self.linear(name + ".output", out)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        gate, up = self.linear(name + ".gate_up", x).chunk(2, -1)
        return self.linear(name + ".down", F.silu(gate) * up)

    def moe(self, name: str, x: Tensor) -> Tensor:
        c = self.c
        scores = torch.sigmoid(self.linear(name + ".router.linear", x))
        biased = (scores + self.biases[name + ".router.bias_E"]).detach()
        grouped = biased.view(len(x), c.num_groups, -1)
        best = grouped.sort(-1, descending=True).values[..., :2].sum(-1)
        keep = best.topk(c.groups_per_token, -1).indices
        allowed = torch.zeros_like(best).scatter(1, keep, 1).repeat_interleave(grouped.shape[-1], 1).bool()
        chosen = biased.masked_fill(~allowed, float("-inf")).topk(c.experts_per_token, -1).indices
        self.loads[name + ".router.bias_E"] += torch.bincount(chosen.flatten(), minlength=c.num_experts)
        mask = torch.zeros_like(scores).scatter(1, chosen, 1)
        self.routed.setdefault(name, []).append((scores, mask))
        gates = scores * mask
        gates = gates / gates.sum(-1, keepdim=True) * c.route_scale
        y = torch.stack([self.mlp(f"{name}.experts.{e}", x) for e in range(c.num_experts)], 1)
        y = (gates.unsqueeze(-1) * y).sum(1)
        return y + self.mlp(name + ".shared", x) if c.num_shared_experts else y

    def layer(self, name: str, h: Tensor, documents: Tensor, positions: Tensor, dense: bool) -> Tensor:
        h = h + self.attention(f"{name}.attention", self.norm(f"{name}.attention_norm", h), documents, positions)
        x = self.norm(f"{name}.mlp_norm", h)
        return h + (self.mlp(f"{name}.mlp", x) if dense else self.moe(name, x))

    def sequence(
        self, tokens: Tensor, targets: Tensor, documents: Tensor, positions: Tensor
    ) -> list[tuple[Tensor, int]]:
        """For each term of the loss, its sum over one sequence and the number of its targets: main, MTP …, z."""
        h = self.params["embedding.weight"][tokens]
        for layer in range(self.c.num_layers):
            h = self.layer(f"layers.{layer}", h, documents, positions, layer < self.c.num_dense_layers)
        h = self.norm("norm", h)
        logits = self.linear("head", h)
        terms = [self.token_losses(logits, targets)]
        z = logits[targets >= 0].exp().sum(-1).log()
        for k in range(1, self.c.mtp_depth + 1):
            h, loss = self.mtp(k, h, tokens, targets, documents, positions)
            terms.append(loss)
        return [*terms, (z.square().sum(), len(z))]

    def mtp(
        self, k: int, h: Tensor, tokens: Tensor, targets: Tensor, documents: Tensor, positions: Tensor
    ) -> tuple[Tensor, tuple[Tensor, int]]:
        """Module k, token by token: position i sees token i+k and predicts the one after it, inside its document."""
        S = len(tokens)
        ahead = [tokens[(i + k) % S] for i in range(S)]
        wanted = [
            int(targets[i + k]) if i + k < S and documents[i + k] == documents[i] else -1 for i in range(S)
        ]  # fmt: skip
        e = self.norm(f"mtp.{k}.embedding_norm", self.params["embedding.weight"][torch.stack(ahead)])
        merged = self.linear(f"mtp.{k}.projection", torch.cat((e, self.norm(f"mtp.{k}.hidden_norm", h)), -1))
        h = self.norm(f"mtp.{k}.norm", self.layer(f"mtp.{k}.layer", merged, documents, positions, dense=False))
        return h, self.token_losses(self.linear("head", h), torch.tensor(wanted))

    def token_losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        log_p = logits.log_softmax(-1)
        known = targets >= 0
        return -log_p[known].gather(1, targets[known, None]).sum(), int(known.sum())

    def terms(self, micro_batches: Sequence[Any]) -> list[Tensor]:
        """The terms of the loss of a global batch, each a mean over its own targets: main, MTP 1 …, z."""
        rows = []
        self.balance_loss = torch.zeros(())
        for mb in micro_batches:
            self.routed = {}
            for row in zip(mb.tokens_BS, mb.targets_BS, mb.documents_BS, mb.positions_BS, strict=True):
                rows.append(self.sequence(*row))
            self.balance_loss = self.balance_loss + sum(self.imbalance(routed) for routed in self.routed.values())
        self.balance_loss = self.balance_loss / len(rows)
        return [torch.stack([s for s, _ in term]).sum() / sum(n for _, n in term) for term in zip(*rows, strict=True)]

    def loss(self, micro_batches: Sequence[Any]) -> Tensor:
        """What is minimised: the mean token loss, plus the weighted terms."""
        return self.weighted(self.terms(micro_batches))

    def weighted(self, terms: list[Tensor]) -> Tensor:
        main, *mtp, z = terms
        return main + self.mtp_weight * sum(mtp) / max(1, len(mtp)) + self.z_weight * z

    def imbalance(self, routed: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The two balance losses of one layer and micro-batch, summed over its sequences (report, eq. 17 to 20)."""
        E, K = self.c.num_experts, self.c.experts_per_token
        by_sequence = torch.zeros(())
        for scores, _ in routed:
            f = [(scores.topk(K, -1).indices == i).to(scores).sum() * E / (K * len(scores)) for i in range(E)]
            P = [(scores[:, i] / scores.sum(1)).mean() for i in range(E)]
            by_sequence = by_sequence + sum(f_i * P_i for f_i, P_i in zip(f, P, strict=True))
        scores, mask = (torch.cat(parts) for parts in zip(*routed, strict=True))
        f, P = mask.mean(0) * E / K, (scores / scores.sum(1, keepdim=True)).mean(0)
        return self.balance[0] * by_sequence + self.balance[1] * len(routed) * (f * P).sum()

    def update_biases(self, rate: float) -> None:
        for name, load in self.loads.items():
            mean = load.double().mean()
            self.biases[name] += rate * torch.sign(mean - load.double()).to(self.biases[name].dtype)
            load.zero_()
