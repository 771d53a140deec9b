"""Multi-token prediction: which token is predicted from where, and equality with the serial oracle in every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.schedules import SCHEDULES, make_schedule
from model.batch import IGNORE, MicroBatch
from model.loss import LossConfig
from parallel.grads import embedding_holders
from tests.spawn import run_ranks
from tests.test_serial_equality import CONFIG, Case, check_cases

MTP1 = replace(CONFIG, num_layers=4, mtp_depth=1)
MTP2 = replace(CONFIG, num_layers=4, mtp_depth=2)
SPLIT_ENDS = ("one_f_one_b", "gpipe", "zb1p", "interleaved_1f1b")  # the last stage is not where the embedding is


@st.composite
def packed_rows(draw: st.DrawFn) -> MicroBatch:
    """One row of documents of any length; each closed by a token without a target, as the data loader makes them."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    ends_open = draw(st.booleans())  # the last document may go on in the next row
    total = sum(lengths)
    documents = torch.cat([torch.full((n,), d) for d, n in enumerate(lengths)])
    positions = torch.cat([torch.arange(n) for n in lengths])
    targets = torch.arange(1, total + 1)
    targets[(documents[1:] != documents[:-1]).nonzero().flatten()] = IGNORE
    if not ends_open:
        targets[-1] = IGNORE
    return MicroBatch(torch.arange(total)[None], targets[None], documents[None], positions[None])


@given(packed_rows(), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_a_module_predicts_the_token_that_its_depth_says_and_never_crosses_a_border(mb: MicroBatch, depth: int) -> None:
    """Tokens count 0, 1, 2, …, so the token to predict at position i is i + depth + 1."""
    tokens, targets = (t[0].tolist() for t in mb.ahead(depth))
    documents, next_ = mb.documents_BS[0].tolist(), mb.targets_BS[0].tolist()
    for i, target in enumerate(targets):
        inside = i + depth < len(documents) and documents[i + depth] == documents[i] and next_[i + depth] != IGNORE
        assert target == (i + depth + 1 if inside else IGNORE)
        if inside:
            assert tokens[i] == i + depth
    assert mb.target_counts(depth)[depth] == sum(t != IGNORE for t in targets)


@pytest.mark.parametrize("name", SCHEDULES)
def test_who_holds_the_embedding(name: str) -> None:
    schedule = make_schedule(name, 4, 8)
    without, with_mtp = (embedding_holders(schedule, c) for c in (CONFIG, MTP1))
    assert without == ([0, 3] if name == "dualpipe" else [0])
    assert with_mtp == ([0, 3] if name in ("dualpipe", *SPLIT_ENDS) else [0])


CASES = {
    1: [Case(1, schedule="one_f_one_b", config=MTP2), Case(1, config=MTP1)],
    2: [Case(2, schedule=name, config=MTP1, steps=2) for name in SCHEDULES]
    + [
        Case(2, config=MTP2, steps=2, loss=LossConfig(mtp_weight=0.1, z_weight=0.01)),
        Case(2, config=replace(MTP1, recompute=True), steps=2),
        Case(2, schedule="zb1p", config=replace(MTP1, recompute=True, query_rank=0), steps=2),
        Case(2, schedule="one_f_one_b", config=MTP2, dtype=torch.float32, steps=2),
    ],
    4: [Case(2, ep=2, schedule=name, config=MTP1, steps=2) for name in SCHEDULES]
    + [Case(4, schedule=name, config=MTP2, steps=2) for name in ("dualpipe", "zb1p")]
    + [Case(1, ep=4, config=MTP1, dtype=torch.float32, steps=2)],
}


@pytest.mark.parametrize("world", sorted(CASES))
def test_training_with_mtp_equals_the_serial_oracle(world: int) -> None:
    assert run_ranks(world, check_cases, CASES[world], timeout=500) == [len(CASES[world])] * world
