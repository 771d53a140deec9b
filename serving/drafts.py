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
from itertools import accumulate

import torch
from torch import Tensor

from model.decode import Decoder, Piece
from model.sampling import ACCEPT, DRAFT, Sampling, draw, probabilities, uniform
from serving.sequence import Draft, Sequence


def verify(
    logits_NV: Tensor, samplings: Many[Sampling], indices: Many[int], drafts: Many[Draft | None]
) -> list[list[int]]:
    """Each sequence's tokens from its index on: one, or two if there was a draft and it is taken.

    logits_NV   of one sequence after the other: after its last token and, if it has a draft, after that
    """
    ends = list(accumulate((1 + (draft is not None) for draft in drafts), initial=0))
    if all(s.temperature == 0 for s in samplings):
        best = logits_NV.argmax(-1).tolist()
        right = [draft is not None and draft.token == best[row] for draft, row in zip(drafts, ends, strict=False)]
        return [best[row : row + 1 + taken] for row, taken in zip(ends, right, strict=False)]
    rows = torch.tensor(ends[:-1], device=logits_NV.device)
    per_row = [s for s, draft in zip(samplings, drafts, strict=True) for _ in range(1 + (draft is not None))]
    p_NV = probabilities(logits_NV, per_row)
    from_BV, taken_B = p_NV[rows], [False] * len(drafts)
    guessed = [i for i, draft in enumerate(drafts) if draft is not None]
    if guessed:
        q_GV = torch.stack([draft.q_V for draft in drafts if draft is not None])
        guess_G1 = torch.tensor([[draft.token] for draft in drafts if draft is not None], device=q_GV.device)
        p_GV = from_BV[guessed]
        p_G, q_G = (x.gather(1, guess_G1).flatten().tolist() for x in (p_GV, q_GV))
        for i, p, q in zip(guessed, p_G, q_G, strict=True):
            taken_B[i] = uniform(samplings[i].seed, indices[i], ACCEPT) * q < p
        taken_G1 = torch.tensor([[taken_B[i]] for i in guessed], device=q_GV.device)
        from_BV[guessed] = torch.where(taken_G1, p_NV[rows[guessed] + 1], (p_GV - q_GV).clamp_(min=0))
    numbers = [uniform(s.seed, i + taken) for s, i, taken in zip(samplings, indices, taken_B, strict=True)]
    drawn = zip(draw(from_BV, numbers), drafts, taken_B, strict=True)
    return [[draft.token, token] if taken and draft is not None else [token] for token, draft, taken in drawn]


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
