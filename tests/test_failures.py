"""A pipeline whose peer dies, stalls or raises ends soon on every rank, and each says what happened; nothing stays."""

from __future__ import annotations

import os
import re
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualpipe.pipeline import Pipeline
from dualpipe.runtime import PipelineError
from dualpipe.schedules import make_schedule
from tests.spawn import fork_server, run_ranks
from tests.test_pipeline import Stage, loss, make_batch, serial

TIMEOUT = 3.0  # seconds for a message, where a rank stalls; who dies or raises is noticed at once
PATIENCE = 40.0  # seconds for a message otherwise
ENOUGH = 25.0  # for all to have ended, on a busy machine; less than PATIENCE


class Faulty(nn.Module):
    """A stage whose third forward goes wrong."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how, self.count = nn.Linear(4, 4), how, 0

    def forward(self, x: Tensor) -> Tensor:
        if not torch._subclasses.fake_tensor.is_fake(x):
            self.count += 1
        if self.count == 3:
            self._fail()
        return self.linear(x)

    def _fail(self) -> None:
        if self.how == "raises":
            raise ArithmeticError("no such number")
        if self.how == "dies":
            os._exit(9)
        if self.how == "stalls":
            time.sleep(TIMEOUT + 2)


def member(rank: int, folder: str, name: str, how: str) -> None:
    """One of two ranks; rank 1's second stage is faulty. Writes how it ended and after how long."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    schedule = make_schedule(name, 2, 6)
    stages = {s: Faulty(how if rank == 1 else "works") for s in schedule.stages_of(rank)}
    timeout = timedelta(seconds=TIMEOUT if how == "stalls" else PATIENCE)
    pipeline = Pipeline(stages, schedule, timeout=timeout)
    batch = [torch.ones(2, 4)] * 6
    started = time.monotonic()
    try:
        pipeline.step(batch, batch, lambda out, target: (out - target).square().sum())
        text = "it went well"
    except PipelineError as error:
        text = f"{time.monotonic() - started:.1f} s\n{error}"
    Path(folder, f"{rank}.txt").write_text(text)
    os._exit(1)  # as a program does that has lost a peer


@pytest.mark.parametrize("name", ["dualpipe", "one_f_one_b"])
@pytest.mark.parametrize("how", ["raises", "dies", pytest.param("stalls", marks=pytest.mark.alone)])
def test_the_other_rank_says_what_it_waited_for(how: str, name: str, tmp_path: Path) -> None:
    context = fork_server()
    processes = [context.Process(target=member, args=(r, str(tmp_path), name, how), daemon=True) for r in range(2)]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + ENOUGH + 20  # starting takes a while too
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, "still running"
    finally:
        for process in processes:
            process.kill()
            process.join()
    took, told = (tmp_path / "0.txt").read_text().split(" s\n", 1)
    assert float(took) < ENOUGH
    assert re.match(r"PP rank 0 failed in \(?\d[FBI]\d\S*: lost rank 1 \(PP rank 1\): ", told), told
    assert re.search(r"(activation|gradient) of stage \d, micro-batch \d \(PP rank 1 → 0\)", told), told
    if how == "raises":
        own = (tmp_path / "1.txt").read_text()
        assert "PP rank 1 failed in " in own
        assert "what another rank reported: PP rank 1 failed in " in told
        assert "in _fail\n    raise ArithmeticError" in told, "the traceback of the stage itself"
    elif how == "dies":
        assert not (tmp_path / "1.txt").exists()


def in_threads(rank: int, world: int) -> None:
    """Two pipelines over one group, each in a thread of its own: they run at the same time."""
    plans = [(make_schedule("dualpipe", 2, 4), 2), (make_schedule("zbv", 2, 6), 4)]
    pipelines = [Pipeline({s: Stage(s) for s in plan.stages_of(rank)}, plan) for plan, _ in plans]
    for (plan, _), pipeline in zip(plans, pipelines, strict=True):  # finding shapes out is collective: in order
        pipeline.evaluate(*make_batch(plan.num_micro_batches), loss)
    failures: list[str] = []

    def run(index: int) -> None:
        plan, num_stages = plans[index]
        _, wanted = serial(num_stages, 1, plan.num_micro_batches)
        for _ in range(5):
            got = pipelines[index].step(*make_batch(plan.num_micro_batches), loss)
            if any(abs(value.item() - wanted[0][m]) > 1e-12 * abs(wanted[0][m]) for m, value in got.items()):
                failures.append(plan.name)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures


def test_two_pipelines_with_different_schedules_run_in_one_process_at_once() -> None:
    run_ranks(2, in_threads)
