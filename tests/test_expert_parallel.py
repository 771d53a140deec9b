"""Expert parallelism in serving: the same bits whatever the ranks, copies and swaps, and nobody waits for ever."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from datetime import timedelta

import torch
from torch import Tensor

from model.config import ModelConfig
from model.names import named_routers, named_tensors
from model.sampling import Sampling
from model.stage import ModelStage
from parallel.whole import empty_model
from serving.engine import CacheSize, Engine
from serving.expert_groups import ServingGroups, serving_groups
from serving.expert_parallel import ExpertParallel
from serving.expert_plan import ExpertSettings
from serving.expert_weights import stage_source
from serving.scheduler import Limits
from serving.sequence import Request
from tests.spawn import run_ranks
from tests.test_decode import CONFIG

EIGHT = replace(CONFIG, init_std=0.5)
GREEDY = Sampling(temperature=0)


def whole_model(config: ModelConfig, precision: str) -> ModelStage:
    model = empty_model(config, precision, seed=3)
    generator = torch.Generator().manual_seed(0)
    for router in named_routers(model).values():
        router.bias_E.copy_(0.2 * torch.randn(config.num_experts, generator=generator))
    return model


def shared(config: ModelConfig, precision: str, groups: ServingGroups, settings: ExpertSettings) -> ExpertParallel:
    """A stage with this rank's experts of the same model."""
    model = whole_model(config, precision)
    stage = empty_model(config, precision, with_experts=False)
    held = {name: tensor for name, tensor, _ in named_tensors(model)}
    with torch.no_grad():
        for name, tensor, _ in named_tensors(stage):
            tensor.copy_(held[name])
    return ExpertParallel(stage, stage_source(model), groups, settings)


def requests(rank: int, count: int, sampling: Sampling = GREEDY) -> list[Request]:
    chance = random.Random(rank)
    return [Request(f"{rank}.{i}", tuple(chance.randrange(61) for _ in range(chance.choice((1, 5, 11, 30)))),
                    chance.randint(4, 16), replace(sampling, seed=i)) for i in range(count)]  # fmt: skip


def engine_of(model: ModelStage, drafts: bool = False, experts: ExpertParallel | None = None) -> Engine:
    return Engine(model, 64, CacheSize(40, 4), Limits(8, 64, 99), drafts, experts)


class Recorder:
    """Keeps the logits of all steps, to compare bits."""

    def __init__(self, engine: Engine) -> None:
        self.rows: list[Tensor] = []
        plain = engine.decoder.logits

        def logits(hidden: Tensor) -> Tensor:
            self.rows.append(plain(hidden))
            return self.rows[-1]

        engine.decoder.logits = logits  # type: ignore[method-assign]


def serve(engine: Engine, wanted: list[Request]) -> dict[str, list[int]]:
    """All of them, in a fixed order of arrival; goes on until nobody on any rank has work."""
    made: dict[str, list[int]] = {r.id: [] for r in wanted}
    for r in wanted:
        engine.add(r)
    assert engine.experts is not None
    while True:
        for event in engine.step():
            made[event.id] += event.tokens
        if engine.experts.quiet:
            return made


def alone(precision: str, rank: int, count: int, drafts: bool, sampling: Sampling) -> tuple[dict[str, list[int]], list]:
    """The same requests in one process, whose experts are in one place."""
    experts = shared(EIGHT, precision, ServingGroups(), ExpertSettings())
    engine = engine_of(experts.stage, drafts, experts)
    recorder = Recorder(engine)
    return serve(engine, requests(rank, count, sampling)), recorder.rows


CASES = {
    "copies": ("fp32", False, ExpertSettings(redundant=5, placement_every=3, slack=0)),
    "bf16, drafts": ("bf16", True, ExpertSettings(redundant=4, placement_every=4)),
    "dynamic": ("fp32", False, ExpertSettings(redundant=8, active=4, placement_every=5)),
    "fp8": ("fp8", False, ExpertSettings(redundant=2, placement_every=3)),
}


def _all_cases(rank: int, world: int) -> dict[str, tuple[int, list[int], int]]:
    groups, found = serving_groups(range(world)), {}
    for name, (precision, drafts, settings) in CASES.items():
        sampling = replace(GREEDY, temperature=0.8) if drafts else GREEDY
        count = (4, 0, 2)[rank]  # one rank has nothing to do, another is done early
        experts = shared(EIGHT, precision, groups, settings)
        engine = engine_of(experts.stage, drafts, experts)
        recorder = Recorder(engine)
        wanted, wanted_rows = alone(precision, rank, count, drafts, sampling)
        for _ in range(2):  # during and after the swaps
            made = serve(engine, requests(rank, count, sampling))
            rows, recorder.rows = recorder.rows, []
            assert made == wanted, name
            assert len(rows) == len(wanted_rows)
            assert all(torch.equal(a, b) for a, b in zip(rows, wanted_rows, strict=True)), name
        held = [len(slots[rank]) for slots in experts.state().slots.values()]
        found[name] = (experts.swapped, held, engine.counters.made)
    return found


def test_the_same_bits_on_three_ranks_with_copies_that_move() -> None:
    found = run_ranks(3, _all_cases)
    for name, (_, _, settings) in CASES.items():
        swapped, slots, _ = found[0][name]
        assert all(other[name][0] == swapped for other in found)
        assert swapped > 0, name
        assert set(slots) == {-(-(8 + settings.redundant) // 3)}
    assert found[1]["copies"][2] == 0
    assert found[0]["copies"][2] > 0


LOST = 1


def _lose_a_rank(rank: int, world: int, precision: str) -> tuple[int, dict[str, list[int]], dict[str, list[int]]]:
    settings = ExpertSettings(redundant=1, placement_every=2, slack=0)
    experts = shared(EIGHT, precision, serving_groups(range(world), timedelta(seconds=60)), settings)
    engine = engine_of(experts.stage, True, experts)
    wanted = requests(rank, 4)
    made: dict[str, list[int]] = {r.id: [] for r in wanted}
    for r in wanted:
        engine.add(r)
    while not engine.idle:
        if rank == LOST and experts.steps == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            events = engine.step()
        except RuntimeError:
            left = [r for r in range(world) if r != LOST]
            experts.rebuild(serving_groups(left, timedelta(seconds=60)))
            continue
        for event in events:
            made[event.id] += event.tokens
    serve(engine, [])  # the others may not be ready
    held = sum(len(slots[experts.groups.rank]) for slots in experts.state().slots.values())
    return held, made, alone(precision, rank, 4, True, GREEDY)[0]


def test_the_others_go_on_when_a_rank_is_killed() -> None:
    """Eight experts and a copy on three ranks, then on two, who read what was lost; nobody's text changes."""
    found = run_ranks(3, _lose_a_rank, "fp32", lost=[LOST])
    for held, made, wanted in (found[0], found[2]):
        assert held == 3 * 5  # three layers of experts, the MTP module's among them
        assert made == wanted
