"""Speculative decoding: the MTP module guesses the token after the next, and the main model checks it (report 5.4.3).

A step reads a sequence's last token and, behind it, the draft of the one to come. The logits after the last token say
whether the draft is right; if it is, those after the draft give one token more, in the same step.

It is exact. A draft d was drawn from the module's distribution q, with the same temperature and limits; p is the main
model's. d is taken with probability min(1, p(d)/q(d)); otherwise a token is drawn from max(0, p − q), normalised. What
comes out is distributed as p (arXiv 2211.17192, theorem 1). In greedy decoding p and q are single tokens, and the
output is that of plain decoding, token for token. With a temperature the same seed gives other tokens than plain
decoding does, of the same distribution.

A position of the module's layer sees the main model's hidden state there, and the token that follows.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from model.decode import Decoder, Piece
from model.sampling import ACCEPT, DRAFT, Sampling, choose, draw, probabilities, uniform
from serving.sequence import Draft, Sequence


def verify(logits_NV: Tensor, sampling: Sampling, index: int, draft: Draft | None) -> list[int]:
    """The tokens from `index` on: one, or two if there was a draft and it is taken.

    logits_NV   after the last token and, if there is a draft, after that
    """
    if draft is None:
        return choose(logits_NV, [sampling], [index])
    p_NV = probabilities(logits_NV, [sampling] * 2)
    p, q = float(p_NV[0, draft.token]), float(draft.q_V[draft.token])
    if uniform(sampling.seed, index, ACCEPT) * q < p:
        return [draft.token, *draw(p_NV[1:], [uniform(sampling.seed, index + 1)])]
    rest_V = (p_NV[0] - draft.q_V).clamp_(min=0)
    return draw(rest_V.unsqueeze(0), [uniform(sampling.seed, index)])


def propose(decoder: Decoder, hidden_TD: Tensor, rows: Many[tuple[Sequence, int, int]]) -> bool:
    """Let the module read what the main model has read in this step, and draft the next token of each sequence.

    Returns whether there was anything to read.

    rows   sequences, the row of hidden_TD where each begins, and how much of it was in the cache before this step
    """
    pieces: list[Piece] = []
    taken: list[int] = []
    ends, total = [], 0
    drafting: list[Sequence] = []
    for s, start, before in rows:
        count = min(s.cached, len(s.tokens) - 1) - before
        if count <= 0:
            continue
        pieces.append(Piece(s.tokens[before + 1 : before + 1 + count], s.slots[: before + count]))
        taken += range(start, start + count)
        total += count
        if s.pending == 1 and s.made and s.request.max_tokens - s.made > 1:
            drafting.append(s)
            ends.append(total - 1)
    if not pieces:
        return False
    drafted_TD = decoder.draft(decoder.batch(pieces), hidden_TD[taken])
    if not drafting:
        return True
    samplings = [s.request.sampling for s in drafting]
    q_BV = probabilities(decoder.logits(drafted_TD[ends]), samplings)
    # made tokens have indices 0 … made − 1; the next step makes token `made`, which is the one that is guessed here
    tokens = draw(q_BV, [uniform(s.request.sampling.seed, s.made, DRAFT) for s in drafting])
    for s, token, q_V in zip(drafting, tokens, torch.unbind(q_BV), strict=True):
        s.draft = Draft(token, q_V)
    return True
