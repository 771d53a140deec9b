"""One sequence, token by token, from whatever computes the forward: the plain loop without batches or a scheduler.

    forward(piece) → logits [V] after the piece's last token

A piece (model/decode.py) names its slots in the cache. This loop uses slots 0, 1, 2, … in order. When all are used, it
goes on with the second half of what it has read, as if it were the beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from model.decode import Decoder, Piece
from model.sampling import Sampling, choose

Forward = Callable[[Piece], Tensor]


def whole_model(decoder: Decoder) -> Forward:
    """The forward of a decoder that holds the whole model."""

    def forward(piece: Piece) -> Tensor:
        return decoder.logits(decoder.forward(decoder.batch([piece]))[-1:])[0]

    return forward


def generate(forward: Forward, prompt: Sequence[int], count: int, window: int, sampling: Sampling) -> Iterator[int]:
    """`count` tokens after the prompt. window: slots of the cache, and so how many tokens are looked at.

    Raises ValueError for an empty prompt or a window of less than two tokens.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character")
    if window < 2:
        raise ValueError(f"a window of {window} tokens is too short to continue anything")
    new, past = list(prompt[-window:]), 0
    seen = list(new)
    for index in range(count):
        if past + len(new) > window:
            seen = seen[-(window // 2) :]
            new, past = seen, 0
        logits = forward(Piece(new, torch.arange(past + len(new))))
        token = choose(logits.unsqueeze(0), [sampling], [index])[0]
        yield token
        past += len(new)
        new = [token]
        seen = [*seen, token]
