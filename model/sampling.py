"""From logits to the next token: greedy, temperature, top-k, top-p, with a seed.

The randomness of a token is a pure function of (seed, index of the token, purpose), so what is drawn does not depend
on what else is computed, nor on how often a computation was interrupted and begun anew.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Purposes of a random number: the token itself, a draft of it, whether to accept the draft.
TOKEN, DRAFT, ACCEPT = range(3)


@dataclass(frozen=True)
class Sampling:
    """temperature 0: always the likeliest token. top_k 0 and top_p 1: no limit. top_k is applied before top_p."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError with the offending value."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be 0 (always the likeliest token) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (no limit) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be more than 0 and at most 1 (no limit)")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} must lie between 0 and 2^64 − 1")


def uniform(seed: int, index: int, purpose: int = TOKEN) -> float:
    """A random number in [0, 1) for the token with this index."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, purpose, index])).random())


def probabilities(logits_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """What each row is drawn from, in FP64: [B, V]. Greedy rows have a single one."""
    out_BV = torch.zeros(logits_BV.shape, dtype=torch.float64, device=logits_BV.device)
    greedy = [i for i, s in enumerate(samplings) if s.temperature == 0]
    warm = [i for i, s in enumerate(samplings) if s.temperature > 0]
    if greedy:
        out_BV[greedy, logits_BV[greedy].argmax(-1)] = 1
    if warm:
        temperatures = _column([samplings[i].temperature for i in warm], out_BV)
        logits = logits_BV[warm].double()  # the largest is taken off first: a tiny temperature must not overflow
        p = ((logits - logits.amax(-1, keepdim=True)) / temperatures).softmax(-1)
        limited = [row for row, i in enumerate(warm) if samplings[i].top_k or samplings[i].top_p < 1]
        if limited:  # of these rows alone: others must not even be rounded anew
            p[limited] = _limited(p[limited], [samplings[warm[row]] for row in limited])
        out_BV[warm] = p
    return out_BV


def draw(p_BV: Tensor, numbers: Sequence[float]) -> list[int]:
    """A token for each row from its distribution and a number in [0, 1); deterministic."""
    sums_BV = p_BV.cumsum(-1)
    total_B1 = sums_BV[:, -1:].contiguous()
    tokens_B1 = torch.searchsorted(sums_BV, _column(numbers, sums_BV) * total_B1, right=True)
    last_B1 = torch.searchsorted(sums_BV, total_B1)  # rounding must not lead beyond the last token that is possible
    return torch.minimum(tokens_B1, last_B1).flatten().tolist()


def choose(logits_BV: Tensor, samplings: Sequence[Sampling], indices: Sequence[int]) -> list[int]:
    """The next token of each row, which will be number `indices[b]` of its sequence."""
    if all(s.temperature == 0 for s in samplings):
        return logits_BV.argmax(-1).tolist()
    numbers = [uniform(s.seed, i) for s, i in zip(samplings, indices, strict=True)]
    return draw(probabilities(logits_BV, samplings), numbers)


def _limited(p_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Only the top_k likeliest; of these the fewest whose sum reaches top_p."""
    V = p_BV.shape[1]
    ordered, tokens = p_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(V, device=p_BV.device)
    top_k = _column([min(s.top_k or V, V) for s in samplings], p_BV)
    ordered = ordered.masked_fill(rank_V >= top_k, 0)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill((before >= _column([s.top_p for s in samplings], p_BV)) & (rank_V > 0), 0)
    return torch.zeros_like(p_BV).scatter_(1, tokens, ordered / ordered.sum(-1, keepdim=True))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
