"""Redundant experts under a skewed load: how even the ranks are, and what that is worth.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.serving_experts [--case 4 1.2]... [--redundant 0 4 8]

Ranks serve one model of 32 experts together (serving/expert_parallel.py). Its texts have topics: by construction the
tokens of a topic resemble each other, so they choose alike among the experts, and the model continues a text within
its topic. The routers' biases balance all experts when topics are equally frequent, as training would. The load is
skewed: topics are drawn with Zipf's law, the same ones for each measurement.

before   the first placement, which knows no loads: experts in order, redundant copies of the first ones
after    loads were measured, placements planned, and experts moved, while the ranks served

Experts then move to and fro, and both placements are measured in turns; the median of three rounds counts. Every rank's
batch is the same in each, so all texts must be equal; that is checked. Three figures:

    maximum over mean load   of the rows that ranks computed, the mean over the layers
    tokens/s                 of all ranks together; with more ranks than cores it says little
    tokens/busiest second    the same over the processor time of the busiest rank (waiting takes none): what a machine
                             with a core for every rank could reach at most
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import Row, publish
from model.balance import update_bias
from model.config import ModelConfig
from model.decode import Decoder, Piece
from model.names import named_routers, named_tensors
from model.sampling import Sampling
from model.stage import ModelStage
from parallel.whole import empty_model
from serving.engine import CacheSize, Engine
from serving.expert_groups import serving_groups
from serving.expert_parallel import ExpertParallel
from serving.expert_plan import ExpertSettings
from serving.expert_weights import stage_source
from serving.scheduler import Limits
from serving.sequence import Request
from tests.spawn import run_ranks

TOPICS, TOKENS_PER_TOPIC = 32, 8
CONFIG = ModelConfig(
    vocab_size=TOPICS * TOKENS_PER_TOPIC, num_layers=4, num_dense_layers=1, hidden_size=384, dense_ffn_size=768,
    num_heads=4, query_rank=128, key_value_rank=64, head_dim=32, rope_dim=16, value_dim=32, num_experts=32,
    experts_per_token=2, num_shared_experts=1, expert_ffn_size=512, num_groups=8, groups_per_token=1,
)  # fmt: skip
CASES = ((2, 1.2), (4, 1.2), (4, 2.5))  # ranks, and the exponent of Zipf's law
REQUESTS = 48  # in all; half of a rank's run at once
PHASES = {"prefill": (96, 1), "decode": (4, 24)}  # tokens of the prompt, and new ones
ROUNDS = 3
METRICS = {"uneven": "maximum over mean load", "rate": "tokens/s", "busiest": "tokens/busiest second"}


def topic_model() -> ModelStage:
    """Random weights, but for embedding, head and routers: see the top."""
    model = empty_model(CONFIG, "fp32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        topic_TD = torch.randn(TOPICS, 1, CONFIG.hidden_size, generator=generator)
        own = torch.randn(TOPICS, TOKENS_PER_TOPIC, CONFIG.hidden_size, generator=generator)
        model.embedding.weight.copy_((topic_TD + 0.4 * own).flatten(0, 1))
        model.head.weight.copy_((topic_TD + 0.4 * own).roll(1, 1).flatten(0, 1))  # the next token of the topic
        for router in named_routers(model).values():
            router.linear.weight.mul_(5)
    return model


def fitted_biases(model: ModelStage, steps: int = 300) -> dict[str, Tensor]:
    """Biases under which all experts are equally loaded when topics are: as in training."""
    decoder = Decoder(model, slots=CONFIG.vocab_size)
    pieces = [Piece([token], torch.tensor([token])) for token in range(CONFIG.vocab_size)]
    routers = named_routers(model)
    for step in range(steps):
        for load_E in decoder.loads.values():
            load_E.zero_()
        decoder.forward(decoder.batch(pieces))
        for router, load_E in zip(routers.values(), decoder.loads.values(), strict=True):
            update_bias(router.bias_E.unsqueeze(0), load_E.unsqueeze(0), 0.02 * (1 - step / steps))
    return {name: router.bias_E.clone() for name, router in routers.items()}


def requests(rank: int, world: int, phase: str, exponent: float) -> list[Request]:
    """The same for every measurement."""
    chance = np.random.default_rng((rank, len(phase)))
    shares = 1 / np.arange(1, TOPICS + 1) ** exponent
    prompt, new = PHASES[phase]
    found = []
    for i, topic in enumerate(chance.choice(TOPICS, REQUESTS // world, p=shares / shares.sum())):
        words = topic * TOKENS_PER_TOPIC + chance.integers(0, TOKENS_PER_TOPIC, prompt)
        found.append(Request(str(i), tuple(words.tolist()), new, Sampling(temperature=0.3, seed=i)))
    return found


@dataclass(frozen=True)
class Served:
    """uneven: maximum over mean load. busiest: tokens per second of processor time of the busiest rank."""

    uneven: float
    rate: float
    busiest: float


def serve(engine: Engine, wanted: Sequence[Request]) -> tuple[Served, dict[str, list[int]]]:
    """The tokens read and made of all ranks together, and this rank's texts."""
    experts = engine.experts
    assert experts is not None
    made: dict[str, list[int]] = {r.id: [] for r in wanted}
    for r in wanted:
        engine.add(r)
    experts.groups.gather(None)
    before, started, busy = engine.counters.read + engine.counters.made, time.perf_counter(), time.thread_time()
    while True:
        for event in engine.step():
            made[event.id] += event.tokens
        if experts.quiet:
            break
    seconds, busy = time.perf_counter() - started, time.thread_time() - busy
    told = experts.groups.gather((engine.counters.read + engine.counters.made - before, seconds, busy))
    experts.measure()
    tokens, all_seconds, all_busy = zip(*told, strict=True)
    uneven = statistics.mean(experts.imbalance.values())
    return Served(uneven, sum(tokens) / max(all_seconds), sum(tokens) / max(all_busy)), made


def shared_engine(rank: int, world: int, redundant: int, biases: dict[str, Tensor]) -> Engine:
    """This rank's engine over a part of the model's experts."""
    model = topic_model()
    for name, router in named_routers(model).items():
        router.bias_E.copy_(biases[name])
    stage = empty_model(CONFIG, "fp32", with_experts=False)
    held = {name: tensor for name, tensor, _ in named_tensors(model)}
    with torch.no_grad():
        for name, tensor, _ in named_tensors(stage):
            tensor.copy_(held[name])
    groups = serving_groups(range(world))
    experts = ExpertParallel(stage, stage_source(model), groups, ExpertSettings(redundant=redundant))
    at_once = REQUESTS // world // 2
    return Engine(stage, 256, CacheSize(at_once * 16, 16), Limits(at_once, 512, 999), experts=experts)


def move(engine: Engine) -> None:
    """Step until all experts are where they are wanted."""
    assert engine.experts is not None
    while engine.experts.moving:
        engine.step()


@torch.inference_mode()
def measure(
    rank: int, world: int, redundant: int, exponent: float, biases: dict[str, Tensor]
) -> tuple[int, dict[str, dict[str, list[Served]]]]:
    """How many copies moved to the planned placement; what was measured, by phase and moment."""
    engine = shared_engine(rank, world, redundant, biases)
    experts = engine.experts
    assert experts is not None
    loads = {phase: requests(rank, world, phase, exponent) for phase in PHASES}
    texts = {phase: serve(engine, wanted)[1] for phase, wanted in loads.items()}
    placements = {"before": experts.state().slots}
    experts.replan()
    move(engine)
    swapped, placements["after"] = experts.swapped, experts.state().slots
    found: dict[str, dict[str, list[Served]]] = {phase: {moment: [] for moment in placements} for phase in PHASES}
    for _ in range(ROUNDS):
        for moment, slots in placements.items():
            experts.move_to(slots)
            move(engine)
            for phase, wanted in loads.items():
                served, made = serve(engine, wanted)
                found[phase][moment].append(served)
                if made != texts[phase]:
                    raise RuntimeError(f"a placement changed what was generated: {made} instead of {texts[phase]}")
    return swapped, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=float, nargs=2, action="append", metavar=("RANKS", "ZIPF"))
    parser.add_argument("--redundant", type=int, nargs="+", default=[0, 4, 8])
    parser.add_argument("--keep", action="store_true", help="leave other cases in the file of results as they are")
    options = parser.parse_args()
    biases = fitted_biases(topic_model())
    rows = []
    for ranks, exponent in options.case or CASES:
        for redundant in options.redundant:
            swapped, found = run_ranks(int(ranks), measure, redundant, exponent, biases)[0]
            for phase, moments in found.items():
                case = f"{ranks:g} ranks, Zipf {exponent:g}, {redundant} redundant, {swapped} moved: {phase}"
                for name, metric in METRICS.items():
                    before, after = (statistics.median(getattr(served, name) for served in moments[moment])
                                     for moment in ("before", "after"))  # fmt: skip
                    rows.append(Row(case, metric, after, "before", before))
    publish("serving_experts", rows, options.keep)


if __name__ == "__main__":
    main()
