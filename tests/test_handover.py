"""Prefill in one process, decode in another: the cache arrives bit for bit, and tokens are those of one engine."""

from __future__ import annotations

import queue
from functools import partial

import pytest
import torch
import torch.distributed as dist

from model.sampling import Sampling
from serving.admission import Refused
from serving.drafts import propose
from serving.engine import CacheSize, Engine
from serving.handover import HandoverError, LinkEnd, Pair, receive_cache, send_cache, send_nothing
from serving.scheduler import Limits
from serving.sequence import Request, Sequence
from serving.sides import DecodeEngine, PrefillEngine
from tests.alone import run_alone
from tests.spawn import run_ranks
from tests.test_decode import CONFIG, model_of
from tests.test_engine import GREEDY, MAX, requests

CASES = {"plain": (False, GREEDY), "sampled": (False, Sampling(0.9, 20, 0.95)), "drafts": (True, GREEDY)}


def prefill(drafts: bool, pages: int = 30) -> PrefillEngine:
    return PrefillEngine(model_of(CONFIG, "fp32"), MAX, CacheSize(pages, 4), Limits(4, 24), drafts)


def decode(drafts: bool, pages: int = 40, sequences: int = 3) -> DecodeEngine:
    return DecodeEngine(model_of(CONFIG, "fp32"), MAX, CacheSize(pages, 7), Limits(sequences, 32), drafts)


def make_pair(rank: int, name: str) -> Pair:
    store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
    return Pair("gloo", store, rank, 30, torch.device("cpu"))


def run_side(rank: int, world: int) -> dict[str, dict[str, object]]:
    """Rank 0 reads prompts, rank 1 goes on; what each made, and the latents that left and came."""
    return {name: (_prefill if rank == 0 else _decode)(make_pair(rank, name), *case) for name, case in CASES.items()}


def _prefill(pair: Pair, drafts: bool, sampling: Sampling) -> dict[str, object]:
    engine, wanted = prefill(drafts), {r.id: r for r in requests(12, 5, sampling)}
    for request in wanted.values():
        engine.add(request)
    made: dict[str, list[int]] = {}
    latents: dict[str, object] = {}
    for number in range(len(wanted)):
        while not engine.parked and not engine.idle:
            for event in engine.step():
                made[event.id] = list(event.tokens)
        if not engine.parked:
            break
        sequence = engine.leave(next(iter(engine.parked)))
        assert sequence is not None
        cache, slots = engine.decoder.cache, sequence.slots[: sequence.cached]
        latents[sequence.request.id] = cache.take(slots).numpy()
        pair.send(torch.tensor([int(sequence.request.id), sequence.tokens[-1]]))
        send_cache(pair, number, cache, slots)
        engine.release(sequence)
    pair.send(torch.tensor([-1, -1]))
    assert engine.pool.used == 0
    return {"made": made, "latents": latents}


def _decode(pair: Pair, drafts: bool, sampling: Sampling) -> dict[str, object]:
    engine, wanted = decode(drafts), requests(12, 5, sampling)
    made: dict[str, list[int]] = {}
    latents: dict[str, object] = {}
    number = 0

    def step() -> None:
        for event in engine.step():
            made[event.id] = [*made.get(event.id, []), *event.tokens]

    while (first := pair.receive((2,), torch.int64).tolist())[0] >= 0:
        while (sequence := engine.reserve(wanted[first[0]], first[1:])) is None:
            step()
        slots = sequence.slots[: sequence.cached]
        receive_cache(pair, number, engine.decoder.cache, slots)
        latents[sequence.request.id] = engine.decoder.cache.take(slots).numpy()
        engine.adopt(sequence)
        number += 1
        step()
    while not engine.idle:
        step()
    assert engine.pool.used == 0
    return {"made": made, "latents": latents}


def test_tokens_of_two_processes_are_those_of_one_engine_and_the_cache_arrives_bit_for_bit() -> None:
    left, right = run_ranks(2, run_side)
    for name, (drafts, sampling) in CASES.items():
        sent, came = left[name]["latents"], right[name]["latents"]
        assert len(sent) > 8
        assert sent.keys() == came.keys()
        for id, latents in sent.items():
            assert latents.shape[0] == CONFIG.num_layers + drafts
            assert (latents == came[id]).all()
            assert abs(latents).min() > 0, "slots that nobody has written"
        for request in requests(12, 5, sampling):
            one = Engine(model_of(CONFIG, "fp32"), MAX, CacheSize(64, 4), Limits(), drafts)
            both = [*left[name]["made"][request.id], *right[name]["made"].get(request.id, [])]
            assert both == run_alone(one, request), (name, request)


def wrong_order(rank: int, world: int) -> str:
    """Hand-over 1 is called off, 3 comes where 2 is expected; then the other end goes away."""
    ended: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    connected: queue.SimpleQueue[bool] = queue.SimpleQueue()
    end = LinkEnd(partial(make_pair, rank, "order"), lambda: connected.put(True), ended.put)
    end.start()
    cache = model_cache()
    slots = torch.arange(5)
    came: list[bool] = []
    if rank == 0:
        end.do(lambda pair: send_nothing(pair, 1))
        end.do(lambda pair: send_cache(pair, 3, cache, slots))
        end.close()
    else:
        end.do(lambda pair: came.append(receive_cache(pair, 1, cache, slots)))
        end.do(lambda pair: came.append(receive_cache(pair, 2, cache, slots)))
    assert connected.get(timeout=30)
    reason = str(ended.get(timeout=30))
    assert rank == 0 or came == [False], "the first one was called off, the second has failed"
    return reason


def model_cache():
    return prefill(False).decoder.cache


def test_a_mistaken_hand_over_is_noticed() -> None:
    _, second = run_ranks(2, wrong_order)
    assert HandoverError.__name__ in second
    assert "hand-over 2 of 5 tokens was to come, but [3, 5] came" in second


def vanishing(rank: int, world: int) -> str:
    """The prefill process is gone while the other one waits for its cache."""
    pair = make_pair(rank, "vanishing")
    dist.barrier()
    if rank == 0:
        del pair
        return ""
    with pytest.raises(RuntimeError):
        receive_cache(pair, 0, model_cache(), torch.arange(5))
    return "noticed"


def test_a_lost_peer_is_noticed() -> None:
    assert run_ranks(2, vanishing)[1] == "noticed"


def read(engine: PrefillEngine, request: Request) -> Sequence:
    engine.add(request)
    while not engine.idle:
        engine.step()
    sequence = engine.leave(request.id)
    assert sequence is not None
    return sequence


def test_room_on_both_sides() -> None:
    """Parked prompts keep their pages, a full decode side takes nobody, and whoever is cancelled frees all."""
    e = prefill(False, pages=8)
    for i in range(3):
        e.add(Request(str(i), tuple(range(1, 17)), 5, GREEDY))
    for _ in range(20):
        e.step()
    assert set(e.parked) == {"0", "1"}, "the third finds no pages"
    assert e.pool.free == 0
    e.cancel("0")
    while len(e.parked) < 2:
        e.step()
    assert e.leave("0") is None
    for id in ("1", "2"):
        e.cancel(id)
    assert e.pool.used == 0
    d = decode(False, pages=6, sequences=3)
    wanted = [Request(str(i), tuple(range(1, 17)), 5, GREEDY) for i in range(3)]
    first = d.reserve(wanted[0], [3])
    assert first is not None
    assert d.reserve(wanted[1], [3]) is not None
    assert d.reserve(wanted[2], [3]) is None, "no pages"
    d.release(first)
    assert d.reserve(wanted[2], [3]) is not None
    assert d.places == 1
    with pytest.raises(Refused, match="exceed the cache"):
        d.reserve(Request("9", (1,) * 40, 20), [3])
    with pytest.raises(Refused, match="cache for prompts"):
        e.add(Request("9", (1,) * 40, 20))
    assert read(e, Request("9", (1,) * 30, 20)).cached == 30


def test_a_step_that_fails_after_its_tokens_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """With shared experts a peer may be lost while the drafts are made: then the next step brings two tokens."""
    request, failures = Request("a", (5, 17, 40), 20, GREEDY), []

    def failing(*arguments: object) -> bool:
        if not failures:
            failures.append(arguments)
            raise RuntimeError("a peer is lost")
        return propose(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("serving.engine.propose", failing)
    e = prefill(True)
    e.add(request)
    with pytest.raises(RuntimeError, match="a peer is lost"):
        e.step()
    events = e.step()
    monkeypatch.undo()
    wanted = run_alone(Engine(model_of(CONFIG, "fp32"), MAX, CacheSize(64, 4)), request)
    assert [list(event.tokens) for event in events] == [wanted[:2]]
    sequence = e.leave("a")
    assert sequence is not None
    assert sequence.cached == 4
    d = decode(True)
    there = d.reserve(request, events[0].tokens)
    assert there is not None
    d.decoder.cache.put(there.slots[:4], e.decoder.cache.take(sequence.slots[:4]))
    d.adopt(there)
    assert [t for _ in range(18) for event in d.step() for t in event.tokens] == wanted[2:]


def test_a_step_that_fails_and_a_sequence_that_then_loses_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token that it had made is told when the prompt has been read again, and then it leaves whole."""
    request = Request("b", (5, 17, 40, 9), 20, GREEDY)

    def failing(*arguments: object) -> bool:
        raise RuntimeError("a peer is lost")

    e = PrefillEngine(model_of(CONFIG, "fp32"), MAX, CacheSize(4, 4), Limits(2, 8), drafts=True)
    e.add(Request("a", tuple(range(14)), 20, GREEDY))  # four pages in the end
    e.add(request)
    monkeypatch.setattr("serving.engine.propose", failing)
    with pytest.raises(RuntimeError, match="a peer is lost"):
        e.step()  # eight tokens of "a"
    with pytest.raises(RuntimeError, match="a peer is lost"):
        e.step()  # the rest of it, so its first token is made, and two tokens of "b"
    assert [event.id for event in e._events] == ["a"]
    victim = e._sequences["a"]
    e.scheduler.running.remove(victim)  # as for one that came before it and needs its pages
    e.pool.give(victim.drop_pages())
    e.scheduler.waiting.append(victim)
    monkeypatch.undo()
    told = []
    for _ in range(6):
        for event in e.step():
            told.append(event.id)
            sequence = e.leave(event.id)
            assert sequence is not None
            assert sequence.cached == len(sequence.tokens) - 1
            e.release(sequence)
            whole = run_alone(Engine(model_of(CONFIG, "fp32"), MAX, CacheSize(64, 4)), sequence.request)
            assert list(event.tokens) == whole[: len(event.tokens)] == sequence.tokens[len(sequence.request.prompt) :]
    assert told == ["b", "a"]
    assert e.pool.used == 0


def test_a_request_that_is_cancelled_after_a_failed_step_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> bool:
        raise RuntimeError("a peer is lost")

    monkeypatch.setattr("serving.engine.propose", failing)
    e = prefill(True)
    e.add(Request("a", (5, 17, 40), 20, GREEDY))
    with pytest.raises(RuntimeError, match="a peer is lost"):
        e.step()
    e.cancel("a")
    assert e.step() == []
    assert e.pool.used == 0


def test_nothing_but_gloo_and_nccl() -> None:
    with pytest.raises(ValueError, match="'mpi'"):
        Pair("mpi", dist.HashStore(), 0, 1, torch.device("cpu"))
