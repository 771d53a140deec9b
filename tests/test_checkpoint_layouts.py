"""A checkpoint of any layout loads under any other: forty and more random pairs, exact to the bit.

Every weight, moment and router bias is set to a value that only its global name decides, saved under one layout and
loaded under another, into zeros. The layouts draw PP, EP, DP, schedule, layers per stage, ZeRO stage, precision of
weights and moments, MTP and the number of processes. Layouts of equally many processes share a process group.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dualpipe.schedules import make_schedule
from model.config import ModelConfig
from model.names import named_tensors
from model.precisions import make_precision
from parallel.build import BuildOptions, Replica, build_replica
from parallel.fragments import Fragment
from parallel.grads import embedding_holders, mirrors
from parallel.memory import Memory, measure, predict
from parallel.mesh import Layout, Mesh
from parallel.saved import RunState, checkpoint_path
from parallel.update import Update
from parallel.zero import load_deepspeed
from tests.spawn import run_ranks
from training.checkpoint import load, run_fragments
from training.checkpoint_writer import CheckpointWriter
from training.inspect_checkpoint import describe
from training.optimizer import OptimConfig, make_update

pytestmark = pytest.mark.slow

PAIRS = 44
CONFIG = ModelConfig(
    vocab_size=19, num_layers=5, num_dense_layers=1, hidden_size=8, dense_ffn_size=10, num_heads=2, query_rank=6,
    key_value_rank=4, head_dim=4, rope_dim=2, value_dim=4, num_experts=4, experts_per_token=2, num_shared_experts=1,
    expert_ffn_size=6, num_groups=2, groups_per_token=2, mtp_depth=1,
)  # fmt: skip


@dataclass(frozen=True)
class Setup:
    world: int
    pp: int
    ep: int
    schedule: str
    layers: tuple[int, ...]
    zero: int
    precision: str
    moments: str


def draw(random_: random.Random) -> Setup:
    world = random_.choice([1, 2, 4])
    pp = random_.choice([p for p in (1, 2, 4) if world % p == 0])
    dp = world // pp
    ep = random_.choice([e for e in (1, 2, 4) if dp % e == 0])
    name = random_.choice(["one_f_one_b", "zb1p", "dualpipe", "dualpipev"]) if pp > 1 else "one_f_one_b"
    stages = make_schedule(name, pp, 2 * pp).num_stages
    cuts = sorted(random_.sample(range(1, CONFIG.num_layers), stages - 1)) if stages <= CONFIG.num_layers else None
    if cuts is None:  # dualpipev on 4 ranks has eight stages
        return draw(random_)
    layers = tuple(b - a for a, b in zip([0, *cuts], [*cuts, CONFIG.num_layers], strict=True))
    zero = random_.choice([0, 1])
    precision = random_.choice(["fp32", "bf16", "fp8"] if zero else ["fp32", "bf16", "fp8", "fp64"])
    moments = "fp32" if precision == "fp64" else random_.choice(["fp32", "bf16"])
    return Setup(world, pp, ep, name, layers, zero, precision, moments)


def pairs() -> list[tuple[Setup, Setup]]:
    random_ = random.Random(8)
    return [(draw(random_), draw(random_)) for _ in range(PAIRS)]


def build(setup: Setup) -> tuple[Replica, Update]:
    layout = Layout(setup.world, setup.pp, setup.ep)
    schedule = make_schedule(setup.schedule, setup.pp, 2 * setup.pp)
    mesh = Mesh.create(layout, mirrors(schedule), timedelta(seconds=60), embedding_holders(schedule, CONFIG))
    precision, dtype = make_precision(setup.precision)
    options = BuildOptions(param_dtype=dtype, layers_per_stage=setup.layers)
    replica = build_replica(CONFIG, schedule, mesh, precision, options)
    return replica, make_update(replica, OptimConfig(zero=setup.zero, moments=setup.moments))


def known(fragment: Fragment) -> Tensor:
    """The values that a tensor of this name has; all can be represented in BF16."""
    seed = int.from_bytes(hashlib.sha256(fragment.name.encode()).digest()[:6], "little")
    whole = torch.randn(fragment.numel, generator=torch.Generator().manual_seed(seed))
    part = whole[fragment.start : fragment.start + fragment.values.numel()]
    return part.bfloat16().to(fragment.values.dtype)


def held(replica: Replica, update: Update) -> Iterator[Fragment]:
    return run_fragments(replica.stages, update, replica.mesh, owned=False)


def save_all(rank: int, world: int, setups: list[tuple[int, Setup]], folder: Path) -> int:
    load_deepspeed(torch.device("cpu"))
    for number, setup in setups:
        replica, update = build(setup)
        for fragment in held(replica, update):
            fragment.values.copy_(known(fragment))
        writer = CheckpointWriter(folder / str(number), replica.mesh, keep_last=1)
        state = RunState(1, 2, 3, 4, {"optim": {"zero": setup.zero}}, "id", world)
        writer.save(state, run_fragments(replica.stages, update, replica.mesh, owned=True))
        writer.close()
        update.close()
    return len(setups)


def load_all(rank: int, world: int, setups: list[tuple[int, Setup]], folder: Path) -> int:
    load_deepspeed(torch.device("cpu"))
    checked = 0
    for number, setup in setups:
        replica, update = build(setup)
        for fragment in held(replica, update):
            fragment.values.zero_()
        path = checkpoint_path(folder / str(number), 1)
        state = load(path, replica.stages, update, replica.mesh, random_states=False)
        assert (state.step, state.samples, state.tokens, update.updates) == (1, 2, 3, 4)
        for fragment in held(replica, update):
            assert torch.equal(fragment.values, known(fragment)), f"pair {number}: {setup}: {fragment.name}"
            checked += 1
        for stage in replica.stages.values():  # and what the model computes with
            for name, tensor, _ in named_tensors(stage):
                wanted = known(Fragment(name, tuple(tensor.shape), 0, tensor.detach().reshape(-1)))
                assert torch.equal(tensor.detach().flatten(), wanted), f"pair {number}: {setup}: weights {name}"
        update.close()
    return checked


def test_random_pairs_of_layouts(tmp_path: Path) -> None:
    every = pairs()
    assert len({s for pair in every for s in pair}) > PAIRS  # they differ
    for side, work in ((0, save_all), (1, load_all)):
        for world in (1, 2, 4):
            setups = [(i, pair[side]) for i, pair in enumerate(every) if pair[side].world == world]
            results = run_ranks(world, work, setups, tmp_path, timeout=500)
            assert min(results) >= len(setups) > 0
    text = describe(checkpoint_path(tmp_path / "0", 1))
    assert "checksums match" in text and "second moments" in text


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_memory_is_that_of_the_formula(zero: int, moments: str) -> None:
    """DualPipe PP 2 × DP 2 with EP 2 in BF16; the difference is the padding of the buckets."""
    setup = Setup(4, 2, 2, "dualpipe", (2, 3), zero, "bf16", moments)
    for predicted, measured in run_ranks(4, _memory, setup):
        for name in ("weights", "gradients", "masters", "moments"):
            assert getattr(measured, name) == pytest.approx(getattr(predicted, name), rel=0.02, abs=1), name


def _memory(rank: int, world: int, setup: Setup) -> tuple[Memory, Memory]:
    load_deepspeed(torch.device("cpu"))
    replica, update = build(setup)
    predicted = predict(replica.stages.values(), 4, 2, setup.zero, 2 if setup.moments == "bf16" else 4)
    measured = measure(update)
    update.close()
    return predicted, measured
