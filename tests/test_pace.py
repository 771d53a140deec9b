"""A rank that computes longer than it used to, or than those with the same work, is named once; a slow job is not."""

from __future__ import annotations

import pytest

from dualpipe.schedules import make_schedule
from parallel.grads import same_stages
from parallel.mesh import Layout, Mesh
from tests.spawn import run_ranks
from training.pace import Pace, PaceMeter


def meter(world: int, same: list[list[int]]) -> PaceMeter:
    return PaceMeter(Mesh(Layout(world, 1, 1), 0, None, None, None, None, None), 1, same)


def compare(found: PaceMeter, *seconds: float) -> Pace | None:
    return found._compare(seconds)


def test_against_its_own_past() -> None:
    found = meter(3, [[0], [1], [2]])
    assert compare(found, 1.0, 2.0, 3.0) is None, "nothing is usual yet"
    pace = compare(found, 1.1, 4.4, 3.0)
    assert pace is not None
    assert pace.slowdown == pytest.approx((1.1, 2.2, 1.0))
    assert pace.stragglers == [1]
    assert pace.news == [], "once may be chance"
    pace = compare(found, 1.0, 4.4, 3.0)
    assert pace is not None and pace.news == [
        "rank 1 computes 4.4 s per step where 2 s are usual for it or for the ranks with the same stages; the others "
        "wait for it"
    ]
    again = compare(found, 1.0, 4.4, 3.0)
    assert again is not None and again.stragglers == [1] and again.news == [], "once is enough"
    well = compare(found, 1.0, 2.0, 3.0)
    assert well is not None and well.stragglers == []
    assert [len(p.news) for p in (compare(found, 2.0, 2.0, 3.0), compare(found, 2.0, 2.0, 3.0)) if p] == [0, 1]


def test_against_those_with_the_same_stages() -> None:
    """From the first comparison on."""
    pace = compare(meter(4, [[0, 1, 2], [0, 1, 2], [0, 1, 2], [3]]), 1.0, 1.0, 1.8, 5.0)
    assert pace is not None and pace.stragglers == [2] and pace.slowest == 2


def test_if_all_are_slow_none_is_to_blame() -> None:
    found = meter(2, [[0], [1]])
    compare(found, 1.0, 2.0)
    pace = compare(found, 3.0, 6.0)
    assert pace is not None and pace.slowdown == (3.0, 3.0) and pace.stragglers == []


def test_who_holds_the_same() -> None:
    found = same_stages(Layout(8, 4, 1), make_schedule("dualpipe", 4, 8))
    assert found[0] == [0, 1, 6, 7]
    assert found[5] == [2, 3, 4, 5]
    assert same_stages(Layout(4, 4, 1), make_schedule("one_f_one_b", 4, 8)) == [[0], [1], [2], [3]]


def _measure(rank: int, world: int) -> list[list[int] | None]:
    import torch.distributed as dist

    mesh = Mesh(Layout(world, world, 1), rank, None, None, None, None, dist.group.WORLD)
    found = PaceMeter(mesh, 2, [[r] for r in range(world)])
    paces = [found.after_step(seconds) for seconds in (1.0, 1.0, 1.0 + 2 * (rank == 1), 1.0 + 2 * (rank == 1))]
    return [None if pace is None else pace.stragglers for pace in paces]


def test_all_ranks_come_to_the_same() -> None:
    assert run_ranks(3, _measure) == [[None, None, None, [1]]] * 3
