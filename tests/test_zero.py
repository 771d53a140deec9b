"""ZeRO-1 through DeepSpeed equals the serial oracle: norm, the shares of the gradient, and every rank's weights.

Cases: DualPipe and others, expert parallelism, uneven stages, stages without experts, groups of one copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

from dualpipe.schedules import make_schedule
from model.loss import LossConfig
from model.names import named_tensors
from model.precision import CastPrecision
from parallel.build import BuildOptions, build_replica
from parallel.fragments import bucket_fragments
from parallel.grads import embedding_holders, mirrors
from parallel.mesh import Layout, Mesh
from parallel.zero import ShardedUpdate, load_deepspeed
from tests.spawn import run_ranks
from tests.test_serial_equality import (
    BIAS_RATE,
    CONFIG,
    GLOBAL_MICRO_BATCHES,
    OPTIM,
    SHUFFLED,
    Case,
    OracleStep,
    by_layer,
    compare_weights,
    make_batch,
    relative,
    train_oracle,
)
from training.optimizer import make_update
from training.step import train_step

pytestmark = pytest.mark.slow

ZERO = replace(OPTIM, zero=1)
TOLERANCE = 1e-6


def check_case(rank: int, case: Case, world: int, oracle: list[OracleStep]) -> None:
    layout = Layout(world, case.pp, case.ep)
    schedule = make_schedule(case.schedule, case.pp, GLOBAL_MICRO_BATCHES // layout.dp)
    mesh = Mesh.create(layout, mirrors(schedule), timedelta(seconds=60), embedding_holders(schedule, case.config))
    options = BuildOptions(
        seed=1, layers_per_stage=case.layers, timeout=timedelta(seconds=60), placement=by_layer(case)
    )
    replica = build_replica(case.config, schedule, mesh, CastPrecision(torch.float32), options)
    update = make_update(replica, ZERO)
    assert isinstance(update, ShardedUpdate)
    for step, wanted in enumerate(oracle):
        mine = make_batch(step)[mesh.dp :: layout.dp]
        result = train_step(replica, update, mine, OPTIM.lr, OPTIM.clip, BIAS_RATE, case.loss)
        label = f"{case.schedule} pp={case.pp} ep={case.ep} dp={layout.dp} step {step} rank {rank}"
        assert abs(result.loss - wanted.loss) <= TOLERANCE * wanted.loss, f"{label}: loss"
        assert abs(result.grad_norm - wanted.norm) <= 5 * TOLERANCE * wanted.norm, f"{label}: gradient norm"
        for shard in update.shards:
            grads = shard.bucket.grads[shard.held]
            for fragment in bucket_fragments(shard, "", grads, shard.held):
                whole = wanted.grads[fragment.name]
                theirs = whole.flatten()[fragment.start :][: fragment.values.numel()]
                error = float((fragment.values - theirs).norm() / whole.norm())
                assert error <= 5e-5, f"{label}: gradient of {fragment.name}: {error}"
            held = shard.held.stop - shard.held.start
            assert all(m.numel() == held for m in shard.moments.values()) and len(shard.moments) == 2
            assert held * shard.bucket.copies == shard.bucket.grads.numel()
        compare_weights(replica.stages, wanted, 10 * TOLERANCE, label)  # each tensor
    assert distance(replica.stages, oracle[-1]) <= TOLERANCE, f"{label}: all weights together"
    update.close()


def distance(stages: Mapping[int, nn.Module], wanted: OracleStep) -> float:
    """Between this rank's weights and the oracle's, relative to their norm."""
    named = {name: t for s in stages.values() for name, t, _ in named_tensors(s) if not name.endswith("bias_E")}
    ours = torch.cat([t.detach().flatten() for t in named.values()])
    return relative(ours, torch.cat([wanted.weights[name].flatten() for name in named]))


def check_cases(rank: int, world: int, cases: list[Case], oracles_file: Path) -> int:
    load_deepspeed(torch.device("cpu"))
    oracles: dict[str, list[OracleStep]] = torch.load(oracles_file, weights_only=False)
    for case in cases:
        check_case(rank, case, world, oracles[key_of(case)])
    return len(cases)


def key_of(case: Case) -> str:
    return f"{case.config} {case.loss}"


def case(pp: int, ep: int = 1, schedule: str = "dualpipe", **more: object) -> Case:
    return Case(pp, ep, schedule, dtype=torch.float32, steps=5, **more)  # type: ignore[arg-type]


def with_mtp(pp: int, ep: int = 1, schedule: str = "dualpipe", **more: object) -> Case:
    """The embedding occurs twice: on one rank under DualPipe, on two under 1F1B. The first stages have no experts."""
    config = replace(CONFIG, num_dense_layers=2, mtp_depth=1)
    return case(pp, ep, schedule, config=config, loss=LossConfig(mtp_weight=0.3), **more)


CASES = {
    2: [with_mtp(2), case(1, ep=2), with_mtp(2, schedule="one_f_one_b"), case(1)],
    4: [case(4, layers=(2, 1, 1, 1)), with_mtp(4, schedule="one_f_one_b"), case(2, ep=2, layers=(1, 4)),
        with_mtp(2, ep=2, schedule="zb1p"), case(2, ep=2, placement=SHUFFLED)],
    8: [with_mtp(4, ep=2), case(2, ep=4)],
}  # fmt: skip


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    every = {key_of(c): c for cases in CASES.values() for c in cases}
    path = tmp_path_factory.mktemp("oracles") / "oracles.pt"
    torch.save({key: train_oracle(c) for key, c in every.items()}, path)
    return path


@pytest.mark.parametrize("world", sorted(CASES))
def test_zero_1_equals_the_serial_oracle(world: int, oracles: Path) -> None:
    assert run_ranks(world, check_cases, CASES[world], oracles, timeout=500) == [len(CASES[world])] * world


def test_muon_is_the_same_under_zero_0_and_1() -> None:
    """Matrices cut anywhere by ZeRO-1 are orthogonalised whole."""
    assert max(run_ranks(4, _muon_difference)) < 1e-6


def _muon_difference(rank: int, world: int) -> float:
    load_deepspeed(torch.device("cpu"))
    layout, schedule = Layout(world, 2, 2), make_schedule("dualpipe", 2, 4)
    mesh = Mesh.create(layout, mirrors(schedule), timedelta(seconds=60))
    weights = []
    for zero in (0, 1):
        replica = build_replica(CONFIG, schedule, mesh, CastPrecision(torch.float32), BuildOptions(seed=1))
        update = make_update(replica, replace(OPTIM, name="muon", zero=zero))
        start = torch.cat([p.detach().flatten() for b in replica.buckets for p in b.parameters])
        for step in range(2):
            train_step(replica, update, make_batch(step, 8)[mesh.dp :: layout.dp], 1e-2, OPTIM.clip, BIAS_RATE)
        weights.append(torch.cat([p.detach().flatten() for b in replica.buckets for p in b.parameters]))
        update.close()
    assert relative(weights[0], start) > 1e-3  # they did move
    return relative(*weights)


def test_masters_keep_what_bf16_weights_lose() -> None:
    assert all(run_ranks(2, _masters_are_exact))


def _masters_are_exact(rank: int, world: int) -> bool:
    load_deepspeed(torch.device("cpu"))
    schedule = make_schedule("dualpipe", 2, 4)
    mesh = Mesh.create(Layout(world, 2, 1), mirrors(schedule), timedelta(seconds=60))
    exact = build_replica(CONFIG, schedule, mesh, CastPrecision(torch.float32), BuildOptions(seed=1))
    wanted = {name: t.detach().flatten() for s in exact.stages.values() for name, t, _ in named_tensors(s)}
    replica = build_replica(CONFIG, schedule, mesh, CastPrecision(torch.bfloat16), BuildOptions(seed=1))
    update = make_update(replica, ZERO)
    assert {b.parameters[0].dtype for b in update.buckets} == {torch.bfloat16, torch.float32}  # norms, routers: FP32
    for shard in update.shards:
        for fragment in bucket_fragments(shard, "", shard.master, shard.held):
            theirs = wanted[fragment.name][fragment.start :][: fragment.values.numel()]
            assert torch.equal(fragment.values, theirs), fragment.name
    update.close()
    return True
