"""The serving engine: whoever shares a batch, and however scarce the cache, each request gets what it gets alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling import Sampling
from serving.admission import Busy, Refused
from serving.engine import CacheSize, Engine
from serving.pages import PagePool
from serving.scheduler import Limits, Scheduler
from serving.sequence import Request, Sequence
from tests.alone import run_alone
from tests.test_decode import CONFIG, model_of, training_logits

MAX = 64
MODEL = model_of(CONFIG, "fp32")
GREEDY = Sampling(temperature=0)


def engine(pages: int = 64, sequences: int = 16, batch: int = 64, drafts: bool = False, waiting: int = 99) -> Engine:
    return Engine(MODEL, MAX, CacheSize(pages, 4), Limits(sequences, batch, waiting), drafts)


def requests(count: int, seed: int, sampling: Sampling = GREEDY) -> list[Request]:
    chance = random.Random(seed)
    return [
        Request(str(i), tuple(chance.randrange(61) for _ in range(chance.choice((1, 2, 5, 11, 30)))),
                chance.randint(1, 24), replace(sampling, seed=i))
        for i in range(count)
    ]  # fmt: skip


def alone(request: Request, drafts: bool = False) -> list[int]:
    return run_alone(engine(drafts=drafts), request)


def together(e: Engine, wanted: list[Request], chance: random.Random, cancel: bool = False) -> dict[str, list[int]]:
    """Requests arrive at random moments, a third of them are cancelled on the way if asked for."""
    made: dict[str, list[int]] = {r.id: [] for r in wanted}
    coming = list(wanted)
    while coming or not e.idle:
        while coming and (e.idle or chance.random() < 0.4):
            e.add(coming.pop(0))
        for event in e.step():
            made[event.id] += event.tokens
        if cancel and made and chance.random() < 0.1:
            gone = chance.choice(list(made))
            if all(r.id != gone for r in coming):
                e.cancel(gone)
                made.pop(gone)
    assert e.pool.used == 0
    return made


def test_fifty_random_interleavings_equal_one_by_one() -> None:
    """Greedy, with a cache that is often full: with and without drafts, cancelled requests among them."""
    preempted, accepted = 0, 0
    for seed in range(50):
        wanted, chance = requests(6, seed), random.Random(seed)
        e = engine(chance.choice((16, 24, 40)), chance.choice((2, 4, 8)), chance.choice((16, 40)), seed % 2 == 1)
        made = together(e, wanted, chance, cancel=seed % 3 == 0)
        assert made
        for r in wanted:
            if r.id in made:
                assert made[r.id] == alone(r), (seed, r)
        preempted += e.scheduler.preemptions
        accepted += e.counters.accepted
    assert preempted > 20
    assert accepted > 20


def test_seeds_decide_not_the_neighbours() -> None:
    sampling = Sampling(temperature=0.9, top_k=20, top_p=0.95)
    wanted = requests(8, 3, sampling)
    e = engine(pages=14)
    made = together(e, wanted, random.Random(0))
    assert e.scheduler.preemptions
    assert all(made[r.id] == alone(r) for r in wanted)
    again = [replace(r, sampling=replace(r.sampling, seed=99)) for r in wanted]
    assert any(alone(r) != made[r.id] for r in again)


def test_logits_of_a_batch_differ_only_in_their_last_digits() -> None:
    """The tolerance that docs/serving.md states."""
    from model.decode import Decoder, Piece

    tokens = torch.randint(0, 61, (16, 20), generator=torch.Generator().manual_seed(0)).tolist()
    for precision, tolerance in (("fp32", 1e-5), ("fp64", 1e-13)):
        model = model_of(CONFIG, precision)
        decoder, slots = Decoder(model, 16 * 20), torch.arange(16 * 20).view(16, 20)
        both = decoder.logits(decoder.forward(decoder.batch([Piece(t, s) for t, s in zip(tokens, slots, strict=True)])))
        for i, row in enumerate(tokens):
            one = decoder.logits(decoder.forward(decoder.batch([Piece(row, slots[i])])))
            assert float((both.view(16, 20, -1)[i] - one).abs().max()) <= tolerance * float(one.abs().max())


def test_greedy_tokens_are_those_of_the_training_forward() -> None:
    request = Request("a", (5, 17, 40), 20, GREEDY)
    tokens = list(request.prompt)
    for _ in range(20):
        tokens.append(int(training_logits(MODEL, [tokens])[0, -1].argmax()))
    assert alone(request) == alone(request, drafts=True) == tokens[3:]


def test_the_end_of_document_ends_a_sequence() -> None:
    request = Request("a", (5, 17, 40), 20, GREEDY)
    made = alone(request)
    eod = made[6]
    first = made.index(eod)
    for drafts in (False, True):
        e = engine(drafts=drafts)
        e.add(replace(request, eod=eod))
        events = []
        while not e.idle:
            events += e.step()
        assert [t for event in events for t in event.tokens] == made[:first]
        assert [event.finish for event in events if event.finish] == ["stop"]


def test_a_long_prompt_is_read_in_pieces_while_others_go_on() -> None:
    e = engine(batch=16)
    e.add(Request("short", (1, 2, 3), 20, GREEDY))
    e.step()
    e.add(Request("long", tuple(range(1, 51)), 2, GREEDY))
    for _ in range(3):
        events = e.step()
        assert [event.id for event in events] == ["short"]
    ids = {event.id for _ in range(2) for event in e.step()}
    assert ids == {"short", "long"}


def test_what_can_never_be_served_is_refused_at_once() -> None:
    e = engine(pages=4, sequences=1, waiting=1)
    cases = {
        "empty": Request("a", (), 3),
        "max_tokens=0": Request("a", (1,), 0),
        "outside of 0": Request("a", (61,), 3),
        "exceed the 64 tokens": Request("a", (1,) * 40, 30),
        "exceed the cache of 16 tokens": Request("a", (1,) * 10, 10),
        "top_p=0": Request("a", (1,), 3, Sampling(top_p=0)),
    }
    for words, request in cases.items():
        with pytest.raises(Refused, match=words):
            e.add(request)
    e.add(Request("a", (1,), 3))
    with pytest.raises(Refused, match="'a'"):
        e.add(Request("a", (1,), 3))
    e.add(Request("b", (1,), 3))
    with pytest.raises(Busy, match="2 requests are running or waiting"):
        e.add(Request("c", (1,), 3))
    with pytest.raises(ValueError, match="batch_tokens=3"):
        engine(sequences=2, batch=3, drafts=True)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=12), st.integers(6, 12),
       st.integers(1, 5), st.integers(5, 30))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_the_schedule_keeps_its_promises(shapes: list[tuple[int, int]], pages: int, running: int, budget: int) -> None:
    """No page has two owners, no step exceeds its budget, everybody ends."""
    pool = PagePool(pages, 6)
    scheduler = Scheduler(pool, Limits(running, budget))
    sequences = [Sequence.of(Request(str(i), (0,) * p, m)) for i, (p, m) in enumerate(shapes) if p + m <= pages * 6]
    scheduler.waiting.extend(sequences)
    steps = 0
    while any(s.finish is None for s in sequences):
        work = scheduler.plan()
        assert work
        assert sum(w.count for w in work) <= budget
        assert len(scheduler.running) <= running
        owned = [page for s in sequences for page in s.pages]
        assert len(owned) == len(set(owned)) == pool.used
        for w in work:
            s = w.sequence
            assert s in scheduler.running
            assert len(s.slots) >= s.cached + w.count
            at_end, s.cached = w.at_end, s.cached + w.count
            if at_end and not s.append(0):
                scheduler.remove(s)
        steps += 1
        assert steps < 5000
    assert pool.used == 0
