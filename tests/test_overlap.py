"""Overlap changes when things run and nothing else: gradients are bit-equal on and off, twice, and on every backend."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta

import pytest
import torch
from torch import Tensor

from dualpipe.schedule import Pair
from dualpipe.schedules import SCHEDULES, make_schedule
from model.batch import MicroBatch
from model.config import ModelConfig
from model.names import named_routers
from model.precision import CastPrecision
from parallel.build import BuildOptions, Replica, build_replica
from parallel.grads import mirrors
from parallel.mesh import Layout, Mesh
from tests.spawn import run_ranks
from tests.test_serial_equality import CONFIG, make_batch

MICRO_BATCHES = 8


def has_pairs(name: str) -> bool:
    return any(isinstance(step, Pair) for row in make_schedule(name, 2, MICRO_BATCHES).steps for step in row)


WITH_PAIRS = [name for name in SCHEDULES if has_pairs(name)]


@dataclass(frozen=True)
class Case:
    """`empty`: micro-batches of EP rank 0 without any row; `experts`: routed to these alone, if given."""

    schedule: str = "dualpipe"
    pp: int = 2
    ep: int = 2
    dtype: torch.dtype = torch.float32
    dispatch: str = "all_to_all"
    empty: tuple[int, ...] = ()
    favourites: int = 0  # experts that every token prefers
    config: ModelConfig = field(default_factory=lambda: CONFIG)


def gradients(case: Case, mesh: Mesh, overlap: bool, dispatch: str | None = None) -> tuple[list[Tensor], list[float]]:
    schedule = make_schedule(case.schedule, case.pp, MICRO_BATCHES)
    options = BuildOptions(seed=1, overlap=overlap, dispatch=dispatch or case.dispatch, timeout=timedelta(seconds=60))
    config = replace(case.config, groups_per_token=case.config.num_groups) if case.favourites else case.config
    replica = build_replica(config, schedule, mesh, CastPrecision(case.dtype), options)
    prefer(replica, case.favourites)
    batch = make_batch(mesh.dp, MICRO_BATCHES)
    if mesh.dp == 0:
        batch = [hollow(mb) if m in case.empty else mb for m, mb in enumerate(batch)]
    losses: list[float] = []
    for _ in range(2):
        found = replica.pipeline.step([replace(mb, loss_scale=1e-2) for mb in batch])
        losses += [found[m].sum().item() for m in sorted(found)]
    parameters = [p for stage in replica.stages.values() for p in stage.parameters()]
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in parameters], losses


def prefer(replica: Replica, favourites: int) -> None:
    if favourites:
        for stage in replica.stages.values():
            for router in named_routers(stage).values():
                router.bias_E[:favourites] += 100.0


def hollow(mb: MicroBatch) -> MicroBatch:
    return replace(mb, **{n: getattr(mb, n)[:0] for n in ("tokens_BS", "targets_BS", "documents_BS", "positions_BS")})


def make_mesh(case: Case, world: int) -> Mesh:
    schedule = make_schedule(case.schedule, case.pp, MICRO_BATCHES)
    return Mesh.create(Layout(world, case.pp, case.ep), mirrors(schedule), timedelta(seconds=60), (), 2)


def check(rank: int, world: int, cases: list[Case]) -> int:
    for case in cases:
        mesh = make_mesh(case, world)
        (on, losses), (again, _), (off, same) = (gradients(case, mesh, o) for o in (True, True, False))
        assert losses == same, f"{case}: losses"
        for first, second, serial in zip(on, again, off, strict=True):
            assert first.isfinite().all()
            assert torch.equal(first, second), f"{case}: two runs differ"
            assert torch.equal(first, serial), f"{case}: overlap on and off differ"
        assert any(flat.count_nonzero() for flat in on)
    return len(cases)


def test_several_schedules_have_pairs() -> None:
    assert {"dualpipe", "dualpipev"} <= set(WITH_PAIRS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_bit_equal_with_overlap_on_and_off_and_in_two_runs(dtype: torch.dtype) -> None:
    cases = [Case(name, dtype=dtype) for name in WITH_PAIRS]
    assert run_ranks(4, check, cases) == [len(cases)] * 4


def test_layers_of_mtp_and_recomputation_overlap_as_well() -> None:
    config = replace(CONFIG, num_layers=4, mtp_depth=1, recompute=True)
    cases = [Case(name, dtype=dtype, config=config) for name in WITH_PAIRS for dtype in (torch.float32, torch.bfloat16)]
    assert run_ranks(4, check, cases) == [len(cases)] * 4


def test_routing_at_the_edge_works_in_a_whole_step() -> None:
    cases = [
        Case(empty=(1, 4)),
        Case(empty=tuple(range(MICRO_BATCHES))),
        Case(favourites=CONFIG.experts_per_token),  # all tokens to the same experts, of which rank 1 has none
        Case("dualpipev", empty=(0,)),
    ]
    assert run_ranks(4, check, cases) == [len(cases)] * 4


def check_backends(rank: int, world: int) -> bool:
    case = Case(pp=1, ep=4, dtype=torch.float64)
    mesh = make_mesh(case, world)
    flat_groups = Mesh.create(mesh.layout, [[0]], timedelta(seconds=60))
    (flat, losses), (nodes, same) = (
        gradients(case, flat_groups, True),
        gradients(case, mesh, True, "hierarchical"),
    )
    assert mesh.expert is not None and (mesh.expert.nodes, mesh.expert.local) == (2, 2)
    assert losses == pytest.approx(same, rel=1e-12)
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(flat, nodes, strict=True))


def test_hierarchical_gives_the_gradients_of_all_to_all() -> None:
    assert all(run_ranks(4, check_backends))
