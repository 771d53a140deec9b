"""Speculative decoding is exact: the distribution of what it makes is the main model's."""

from __future__ import annotations

import pytest
import torch

from model.sampling import DRAFT, Sampling, draw, probabilities, uniform
from serving.drafts import verify
from serving.sequence import Draft, Request
from tests.alone import run_alone
from tests.test_engine import MODEL, alone, engine


@pytest.mark.parametrize("sampling", [Sampling(0.8), Sampling(1.3, top_k=4), Sampling(1.0, top_p=0.7)], ids=str)
def test_what_comes_out_is_distributed_as_the_main_model(sampling: Sampling) -> None:
    """Two tokens in a row, from a main model and a bad guesser, over many seeds: against the exact probabilities."""
    generator = torch.Generator().manual_seed(0)
    main_NV = 1.5 * torch.randn(2, 6, generator=generator)
    q_V = probabilities(main_NV[:1] + 1.5 * torch.randn(1, 6, generator=generator), [sampling])[0]
    p_NV = probabilities(main_NV, [sampling] * 2)
    count, first, second, taken = 20_000, torch.zeros(6), torch.zeros(6), 0
    all_of_them = [Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed) for seed in range(count)]
    guesses = draw(q_V.expand(count, -1), [uniform(seed, 0, DRAFT) for seed in range(count)])
    drafts = [Draft(guess, q_V) for guess in guesses]
    for tokens in verify(main_NV.repeat(count, 1), all_of_them, [0] * count, drafts):
        first[tokens[0]] += 1
        if len(tokens) == 2:
            taken += 1
            second[tokens[1]] += 1
    for seen_V, of, p_V in ((first, count, p_NV[0]), (second, taken, p_NV[1])):
        error_V = 4.5 * (p_V * (1 - p_V) / of).sqrt()
        assert bool(((seen_V / of - p_V).abs() <= error_V + 1e-9).all())
    wanted = float(torch.minimum(p_NV[0], q_V).sum())  # the chance that a draft is taken
    assert abs(taken / count - wanted) < 4.5 * (wanted * (1 - wanted) / count) ** 0.5
    assert 0.05 < wanted < 0.95


def test_a_greedy_draft_is_taken_if_and_only_if_it_is_right() -> None:
    logits, greedy = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]]), Sampling(temperature=0)
    for guess, wanted in ((1, [1, 0]), (2, [1]), (0, [1])):
        q_V = torch.nn.functional.one_hot(torch.tensor(guess), 3).double()
        assert verify(logits, [greedy], [0], [Draft(guess, q_V)]) == [wanted]


def test_sequences_of_a_step_are_verified_as_each_alone() -> None:
    """Greedy and warm ones, with a draft and without."""
    generator = torch.Generator().manual_seed(1)
    samplings = [Sampling(0), Sampling(0.9, seed=3), Sampling(1.1, top_k=3, seed=4), Sampling(0), Sampling(0.7, seed=5)]
    parts, drafts = [], []
    for i in range(len(samplings)):
        parts.append(2 * torch.randn(1 + (i != 2), 6, generator=generator))
        q_V = probabilities(parts[i][:1], [Sampling(1.0)])[0]
        drafts.append(Draft(int(q_V.argmax()), q_V) if i != 2 else None)
    together = verify(torch.cat(parts), samplings, range(5), drafts)
    for i, part in enumerate(parts):
        assert verify(part, [samplings[i]], [i], [drafts[i]]) == [together[i]]
    assert {len(tokens) for tokens in together} == {1, 2}


def test_drafts_save_steps_and_are_counted() -> None:
    """A module that is always right, since it has the main model's head and this ignores what it reads."""
    request = Request("a", (5, 17, 40), 21, Sampling(temperature=0))
    e = engine(drafts=True)
    head = MODEL.head.weight.detach().clone()
    try:
        MODEL.head.weight.data.zero_()  # all logits are equal, and argmax takes token 0
        assert run_alone(e, request) == [0] * 21
    finally:
        MODEL.head.weight.data.copy_(head)
    assert e.counters.acceptance == 1
    assert e.counters.steps == 11
    plain, drafting = engine(), engine(drafts=True)
    assert run_alone(plain, request) == run_alone(drafting, request) == alone(request)
    assert plain.counters.steps == 21
    assert drafting.counters.steps == 21 - drafting.counters.accepted
