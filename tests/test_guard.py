"""Bad steps are skipped on all ranks alike, the layer is named, and a run that goes back does so exactly."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from dualpipe.schedules import make_schedule
from model.precision import CastPrecision
from parallel.build import BuildOptions, build_replica
from parallel.grads import mirrors
from parallel.mesh import Layout, Mesh
from tests.job import MODEL, SIZE, write_text
from tests.spawn import run_ranks
from tests.test_config import compose
from tests.test_serial_equality import CONFIG, OPTIM, make_batch
from training.diagnose import find_culprit
from training.guard import Diverged, Guard, GuardConfig
from training.optimizer import make_update
from training.step import train_step
from training.stop import StopRequest
from training.trainer import Trainer, join_process_group, prepare


def test_bad_steps_in_a_row_are_counted_and_good_ones_forgive() -> None:
    guard = Guard(GuardConfig(max_skipped=3))
    verdicts = [guard.note(math.nan, skipped=bad) for bad in (True, True, False, True, True, True)]
    assert verdicts == [False, False, False, False, False, True]


def test_a_spike_is_measured_against_the_recent_median() -> None:
    guard = Guard(GuardConfig(spike=3, window=5))
    for norm in (1, 2, 3, 4):
        guard.note(norm, skipped=False)
        assert guard.limit == math.inf
    guard.note(2, skipped=False)
    assert guard.limit == 6
    guard.note(100, skipped=True)
    assert guard.limit == 6, "a skipped step says nothing about what is usual"
    other = Guard(GuardConfig(spike=3, window=5))
    other.restore(guard.recent)
    assert other.limit == 6


def test_going_back_has_an_end() -> None:
    guard = Guard(GuardConfig(rewind=True, max_rewinds=2))
    assert [guard.may_rewind() for _ in range(3)] == [True, True, False]
    assert not Guard(GuardConfig()).may_rewind()


def poison_a_gradient(rank: int, world: int) -> tuple[bool, bool, str, bool, str]:
    """On two ranks: NaN in one gradient of rank 1; then, apart from that, a weight that makes outputs infinite."""
    layout, schedule = Layout(world, 2, 1), make_schedule("dualpipe", 2, 4)
    mesh = Mesh.create(layout, mirrors(schedule), timedelta(seconds=60))
    options = BuildOptions(seed=1, timeout=timedelta(seconds=60))
    replica = build_replica(CONFIG, schedule, mesh, CastPrecision(torch.float32), options)
    update = make_update(replica, OPTIM)
    batch = make_batch(0, 4)
    weights = {n: p.detach().clone() for n, p in replica.stages[1].named_parameters()}
    run, victim = replica.pipeline.step, dict(replica.stages[1].named_parameters())["layers.4.router.linear.weight"]

    def step(micro_batches: Any, done: Callable[[int], None]) -> Any:
        def poisoned(stage: int) -> None:
            if rank == 1 and stage == 1:
                bucket, start = next((b, at) for b in replica.buckets for p, at in b.offsets() if p is victim)
                bucket.grads[start] = math.nan
            done(stage)

        return run(micro_batches, poisoned)

    replica.pipeline.step = step  # type: ignore[method-assign]
    result = train_step(replica, update, batch, 1e-3, 0.5, 0.01)
    same = all(torch.equal(p, weights[n]) for n, p in replica.stages[1].named_parameters())
    gradient = find_culprit(replica, batch)
    replica.pipeline.step = run  # type: ignore[method-assign]
    with torch.no_grad():
        dict(replica.stages[0].named_parameters())["layers.1.attention.query_up.weight"][0] = math.inf
    second = train_step(replica, update, batch, 1e-3, 0.5, 0.01)
    return result.skipped, same, gradient, second.skipped, find_culprit(replica, batch)


@pytest.mark.slow
def test_nan_on_one_rank_is_skipped_everywhere_and_its_layer_is_named() -> None:
    found = run_ranks(2, poison_a_gradient)
    for skipped, same, gradient, second, output in found:
        assert skipped and same and second
        assert gradient.startswith("the gradient of layers.4.router.linear.weight is not finite")
        assert output.startswith("the output of layers.1.attention.query_up is not finite")
    assert found[0][2] == found[1][2], "all ranks say the same"


def poison_a_copy(rank: int, world: int, values: list[float]) -> list[tuple[bool, bool, bool]]:
    """After the sum, in the part of a bucket that the other rank measures: is the step skipped, are weights kept?"""
    layout, schedule = Layout(world, 2, 1), make_schedule("dualpipe", 2, 4)
    mesh = Mesh.create(layout, mirrors(schedule), timedelta(seconds=60))
    options = BuildOptions(seed=1, timeout=timedelta(seconds=60))
    replica = build_replica(CONFIG, schedule, mesh, CastPrecision(torch.float32), options)
    update = make_update(replica, OPTIM)
    reduce, found = update.finish_reduction, []
    for value in values:

        def poisoned(value: float = value) -> None:
            reduce()
            if rank == 1:
                replica.buckets[2].grads[1] = value  # rank 0 owns the first half

        update.finish_reduction = poisoned  # type: ignore[method-assign]
        before = {n: p.detach().clone() for s in replica.stages.values() for n, p in s.named_parameters()}
        result = train_step(replica, update, make_batch(0, 4), 1e-3, 0.5, 0.01)
        same = all(torch.equal(p, before[n]) for s in replica.stages.values() for n, p in s.named_parameters())
        found.append((result.skipped, same, math.isnan(result.grad_norm)))
    return found


@pytest.mark.slow
def test_one_copy_that_goes_wrong_after_the_sum_is_noticed_in_the_same_step() -> None:
    bad, good = (True, True, True), (False, False, False)
    assert run_ranks(2, poison_a_copy, [math.nan, 0.0, math.inf, -math.inf]) == [[bad, good, bad, bad]] * 2


def trainer(folder: Path, overrides: str, bad: set[int]) -> Trainer:
    """A run in this process whose gradient is NaN whenever it trains on samples from one of the `bad` places on."""
    places = f"runs_dir={folder}/runs data.path={folder}/text data.cache_dir={folder}/cache"
    common = f"{MODEL} {SIZE} {places} logger=none parallel.pp=1 sample_tokens=0 eval_every=100 launch.threads=1"
    made = prepare(compose(f"{common} {overrides}"), 1)
    one = Trainer(made, join_process_group(made), StopRequest())
    run = one.replica.pipeline.step

    def step(micro_batches: Any, done: Callable[[int], None]) -> Any:
        losses = run(micro_batches, done)
        if one.samples in bad:
            one.replica.buckets[0].grads[0] = math.nan
        return losses

    one.replica.pipeline.step = step  # type: ignore[method-assign]
    return one


def rows(folder: Path) -> dict[int, float | str]:
    lines = (folder / "runs" / "default" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {row["step"]: row["train/loss"] for row in found if "train/loss" in row}


@pytest.mark.slow
def test_a_run_goes_back_and_on_with_other_data(tmp_path: Path) -> None:
    """Samples come four a step. Steps 5 to 7 are bad; step 4 was saved; then 5 to 8 train on what comes after."""
    write_text(tmp_path)
    one = trainer(tmp_path, "steps=8 save_every=4 guard.max_skipped=3 guard.rewind=true", {16, 20, 24})
    one.fit()
    one.close()
    assert one.step == 8
    assert one.samples == 4 * (4 + 3 + 4)
    assert sorted(rows(tmp_path)) == list(range(1, 9))
    text = (tmp_path / "runs" / "default" / "metrics.jsonl").read_text()
    assert "3 steps in a row were skipped, the last was step 7: the gradient of " in text


@pytest.mark.slow
def test_after_going_back_it_computes_with_the_weights_of_the_checkpoint(tmp_path: Path) -> None:
    """Step 4 was saved, step 5 is good, 6 and 7 are bad. Then step 5 is that of a run that starts at the checkpoint."""
    write_text(tmp_path)
    overrides = "precision=bf16 steps=5 save_every=4 guard.max_skipped=2 guard.rewind=true"
    one = trainer(tmp_path, overrides.replace("steps=5", "steps=7"), {20, 24})
    one.fit()
    one.close()
    went_back = rows(tmp_path)[5]
    for later in (6, 7):
        shutil.rmtree(tmp_path / "runs" / "default" / "checkpoints" / f"step_{later:08d}", ignore_errors=True)
    other = trainer(tmp_path, overrides, set())
    assert other.step == 4
    other.samples = 28
    other.fit()
    other.close()
    assert rows(tmp_path)[5] == went_back


@pytest.mark.slow
def test_a_run_that_cannot_go_back_stops_with_the_name_of_the_layer(tmp_path: Path) -> None:
    write_text(tmp_path)
    one = trainer(tmp_path, "steps=8 guard.max_skipped=2", {8, 12})
    with pytest.raises(Diverged, match=r"2 steps in a row were skipped, the last was step 4: the gradient of .*rewind"):
        one.fit()
    one.close()


@pytest.mark.slow
def test_one_bad_step_is_skipped_and_counted(tmp_path: Path) -> None:
    write_text(tmp_path)
    one = trainer(tmp_path, "steps=4", {8})
    one.fit()
    one.close()
    lines = (tmp_path / "runs" / "default" / "metrics.jsonl").read_text().splitlines()
    skipped = {r["step"]: r["train/skipped"] for r in map(json.loads, lines) if "train/skipped" in r}
    assert skipped == {1: 0.0, 2: 0.0, 3: 1.0, 4: 0.0}
