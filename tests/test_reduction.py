"""When a stage's gradients are final, and in which order their sums start."""

from __future__ import annotations

import pytest
import torch

from dualpipe.fill import fill_idle
from dualpipe.runtime import final_stages
from dualpipe.schedule import Kind, parts
from dualpipe.schedules import make_schedule
from parallel.buckets import GradBucket, padded
from parallel.mesh import Layout, Mesh
from parallel.update import Update


@pytest.mark.parametrize("name", ["dualpipe", "one_f_one_b", "zb1p", "dualpipev"])
def test_a_stage_is_final_after_its_last_weight_gradient(name: str) -> None:
    schedule = make_schedule(name, 4, 8)
    for rank, row in enumerate(schedule.steps):
        final = final_stages(row)
        assert sorted(s for stages in final.values() for s in stages) == list(schedule.stages_of(rank))
        for index, stages in final.items():
            for stage in stages:
                assert any(a.stage == stage and a.kind in (Kind.W, Kind.B) for a in parts(row[index]))
                later = [a for step in row[index + 1 :] for a in parts(step) if a.stage == stage]
                assert not [a for a in later if a.kind in (Kind.W, Kind.B)]


def test_mirrors_of_dualpipe_finish_their_stages_in_the_order_of_the_buckets() -> None:
    """The later stage first, on both: so both start the same sum first, and early."""
    schedule = make_schedule("dualpipe", 8, 20)
    for rank, row in enumerate(schedule.steps):
        order = [s for _, stages in sorted(final_stages(fill_idle(row, {}, {})).items()) for s in stages]
        assert order == sorted(schedule.stages_of(rank), reverse=True)


class Recorder(Update):
    """Notes which buckets are summed, and when."""

    def _reduce(self, bucket: GradBucket) -> None:
        self.order.append(bucket.stages)  # type: ignore[attr-defined]

    def publish(self) -> None: ...

    def _apply(self) -> None: ...

    def _used(self, bucket: GradBucket) -> slice:
        return bucket.share


def bucket(*stages: int) -> GradBucket:
    grads = torch.zeros(4)
    return GradBucket(stages, False, True, True, torch.float32, (), (), grads, None, 1, 0)


def test_sums_start_in_order_as_soon_as_their_stages_are_done() -> None:
    mesh = Mesh(Layout(1, 1, 1), 0, None, None, None, None, None)
    update = Recorder([bucket(3), bucket(0), bucket(0, 3)], mesh)
    update.order = []  # type: ignore[attr-defined]
    update.stage_done(0)
    assert update.order == []  # type: ignore[attr-defined]  # stage 3 comes first, on every copy
    update.stage_done(3)
    assert update.order == [(3,), (0,), (0, 3)]  # type: ignore[attr-defined]
    update.finish_reduction()
    update.zero_gradients()
    update.stage_done(3)
    assert update.order[3:] == [(3,)]  # type: ignore[attr-defined]
    update.finish_reduction()
    assert len(update.order) == 6  # type: ignore[attr-defined]


def test_buckets_divide_among_their_copies() -> None:
    assert [padded(n, 3) for n in (1, 6, 7)] == [6, 6, 12]
