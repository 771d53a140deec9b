"""Choosing tokens: limits, determinism, the right distribution; and the plain loop of generation."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.decode import Decoder
from model.generate import generate, whole_model
from model.sampling import ACCEPT, DRAFT, Sampling, choose, draw, probabilities, uniform
from tests.test_decode import CONFIG, model_of, training_logits

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])


def one(sampling: Sampling) -> list[float]:
    return probabilities(LOGITS.unsqueeze(0), [sampling])[0].tolist()


def test_limits_keep_the_likeliest_tokens() -> None:
    assert one(Sampling(temperature=0)) == [0, 1, 0, 0, 0]
    assert [p > 0 for p in one(Sampling(top_k=2))] == [False, True, False, True, False]
    full = LOGITS.double().softmax(-1)
    assert one(Sampling()) == pytest.approx(full.tolist())
    first, second = float(full[1]), float(full[1] + full[3])
    assert [p > 0 for p in one(Sampling(top_p=first - 1e-6))] == [False, True, False, False, False]
    assert [p > 0 for p in one(Sampling(top_p=first + 1e-6))] == [False, True, False, True, False]
    assert [p > 0 for p in one(Sampling(top_p=second + 1e-6))] == [False, True, True, True, False]
    of_two = 1 / (1 + math.exp(-1))  # top_p counts in what top_k has left
    assert [p > 0 for p in one(Sampling(top_k=2, top_p=of_two - 1e-6))] == [False, True, False, False, False]
    assert one(Sampling(temperature=1e-6)) == pytest.approx([0, 1, 0, 0, 0])
    hot = one(Sampling(temperature=2.0))
    assert hot == pytest.approx((LOGITS.double() / 2).softmax(-1).tolist())


@given(st.floats(0, 3), st.integers(0, 9), st.floats(0.01, 1), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_rows_do_not_touch_each_other(temperature: float, top_k: int, top_p: float, seed: int) -> None:
    samplings = [Sampling(temperature, top_k, top_p), Sampling(0.0), Sampling(0.7, 3), Sampling(top_p=0.5)]
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed))
    together = probabilities(logits, samplings)
    assert torch.allclose(together.sum(-1), torch.ones(4, dtype=torch.float64))
    for row, sampling in enumerate(samplings):
        assert torch.equal(together[row], probabilities(logits[row : row + 1], [sampling])[0])


def test_draws_follow_the_distribution_and_the_seed() -> None:
    sampling = Sampling(temperature=0.8, top_k=4, seed=5)
    count = 4000
    tokens = choose(LOGITS.expand(count, -1), [sampling] * count, range(count))
    assert tokens == choose(LOGITS.expand(count, -1), [sampling] * count, range(count))
    assert tokens != choose(LOGITS.expand(count, -1), [Sampling(0.8, 4, seed=6)] * count, range(count))
    seen = Counter(tokens)
    for token, p in enumerate(one(sampling)):
        assert abs(seen[token] / count - p) < 4 * math.sqrt(p * (1 - p) / count) + 1e-9
    assert len({uniform(1, 2), uniform(2, 2), uniform(1, 3), uniform(1, 2, DRAFT), uniform(1, 2, ACCEPT)}) == 5
    assert draw(torch.tensor([[0.0, 1.0, 0.0]]), [0.0]) == draw(torch.tensor([[0.0, 1.0, 0.0]]), [1 - 2**-53]) == [1]


@pytest.mark.parametrize(
    ("sampling", "word"),
    [
        (Sampling(temperature=-1), "temperature=-1"),
        (Sampling(temperature=math.nan), "temperature"),
        (Sampling(top_k=-2), "top_k=-2"),
        (Sampling(top_p=0), "top_p=0"),
        (Sampling(top_p=1.5), "top_p=1.5"),
        (Sampling(seed=-1), "seed=-1"),
    ],
)
def test_nonsense_is_refused(sampling: Sampling, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        sampling.check()


def test_the_plain_loop_equals_a_full_forward_per_token() -> None:
    model = model_of(CONFIG)
    prompt, window = [5, 17, 40], 12
    tokens = list(prompt)
    for _ in range(9):
        tokens.append(int(training_logits(model, [tokens])[0, -1].argmax()))
    forward = whole_model(Decoder(model, window))
    made = list(generate(forward, prompt, 30, window, Sampling(temperature=0)))
    assert made[:9] == tokens[3:]
    # When all slots are used, it goes on as if the last half were all there is.
    seen = [*prompt, *made]
    for i in range(12, 18):
        start = 12 + 1 - window // 2  # 13 tokens did not fit any more
        assert seen[i + 1] == int(training_logits(model, [seen[start : i + 1]])[0, -1].argmax())
    with pytest.raises(ValueError, match="empty"):
        next(generate(forward, [], 1, window, Sampling()))
