"""Runs one rank's part of a schedule on real stages.

    runtime = Runtime(stages, schedule, rank, links, queue)
    losses = runtime.step(micro_batches)

Every rank gets the whole list of micro-batches and takes what its stages need of it: tokens on the first stage,
targets on the last, positions everywhere. After the step all weight gradients have been accumulated. A failure names
the rank, the step's action and the peer.

This is the engine for stages that are cut into segments; `pipeline.py` puts plain torch modules on it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dualpipe.clock import clock_of
from dualpipe.execution import Lap, Mode, Pass, Task, Tools, make_mode
from dualpipe.fill import IdleMeter, fill_idle
from dualpipe.lanes import Lanes, lanes_for
from dualpipe.p2p import P2P, Links, PeerLostError, Transport
from dualpipe.schedule import Kind, Schedule, Step, parts
from dualpipe.stage import Stage
from dualpipe.timeline import COMPUTE, WAITS, Span
from dualpipe.validate import validate
from dualpipe.wgrad import WeightGradQueue


class PipelineError(RuntimeError):
    """A step failed; the message names the rank and the action, the cause is chained."""


class Runtime:
    """One rank of a pipeline.

    stages    the stages that this rank holds, by number; must be those of `schedule.stages_of(rank)`.
    links     process groups of the pipeline; may be None when the schedule has one rank.
    queue     where the stages' layers put their weight gradients.
    overlap   interleave the two chunks of a pair (else run F, then B).
    fill      move deferred weight gradients into idle time measured in earlier steps (`fill.py`).
    timeout   how long a message may take before its sender is given up.
    transport what carries the messages; by default `P2P` over the links.
    lanes     how communication runs beside compute; by default as the device and `overlap` ask (`lanes.py`).

    After a step (not an evaluation), `peak_activations` is how many activations were alive at most, `busy_seconds` how
    long the rank did anything but wait for messages (measured if `fill` or `record` is on), and with
    `record = True`, `spans` has a span for every step of the schedule and every wait, in seconds since the step began
    on this rank.

    Raises InvalidScheduleError for a bad schedule and ValueError for stages that do not fit it.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        schedule: Schedule,
        rank: int,
        links: Links | None,
        queue: WeightGradQueue,
        overlap: bool = True,
        fill: bool = True,
        device: torch.device | None = None,
        timeout: timedelta = timedelta(minutes=5),
        transport: Transport | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        validate(schedule)
        if sorted(stages) != list(schedule.stages_of(rank)):
            raise ValueError(
                f"rank {rank} of {schedule.name} holds stages {schedule.stages_of(rank)}; got {sorted(stages)}"
            )
        if links is None and transport is None and schedule.num_ranks > 1:
            raise ValueError(f"{schedule.name} has {schedule.num_ranks} ranks and needs links between them")
        device = device or torch.device("cpu")
        self.record = False
        self.spans: list[Span] = []
        self.peak_activations = 0
        self.busy_seconds = 0.0
        self._stages = stages
        self._schedule = schedule
        self._rank = rank
        self._tools = Tools(queue, overlap, device, clock_of(device), lanes or lanes_for(device, overlap))
        self._fill = fill
        self._meter = IdleMeter()
        self._transport = transport or P2P(links or Links({}, (0,)), device, timeout)

    @cached_property
    def _training(self) -> Mode:
        return make_mode(self._schedule, self._rank, training=True)

    @cached_property
    def _evaluation(self) -> Mode:
        schedule = self._schedule.forward_only()
        validate(schedule, forward_only=True)
        return make_mode(schedule, self._rank, training=False)

    def step(
        self, micro_batches: Sequence[Any], on_stage_done: Callable[[int], None] | None = None
    ) -> dict[int, Tensor]:
        """Forward and backward of all micro-batches. Returns the losses that arose on this rank, by micro-batch.

        `on_stage_done(stage)` is called as soon as the stage's last weight gradient has been added, while others may
        still be at work: its gradients are final.
        """
        row = self._training.row
        if self._fill:
            row = fill_idle(row, self._meter.idle, self._meter.weights)
        done = self._run(self._training, row, micro_batches, on_stage_done)
        self.peak_activations = done.peak_activations
        self._measure(done.laps)
        return done.losses

    def evaluate(self, micro_batches: Sequence[Any]) -> dict[int, Tensor]:
        """Forward only, without gradients. Returns the losses that arose on this rank, by micro-batch."""
        mode = self._evaluation
        return self._run(mode, mode.row, micro_batches).losses

    def _run(
        self,
        mode: Mode,
        row: tuple[Step, ...],
        micro_batches: Sequence[Any],
        on_stage_done: Callable[[int], None] | None = None,
    ) -> Pass:
        expected = mode.schedule.num_micro_batches
        if len(micro_batches) != expected:
            raise ValueError(f"{mode.schedule.name} was made for {expected} micro-batches; got {len(micro_batches)}")
        run = Pass(mode, self._stages, micro_batches, self._transport, self._tools)
        tasks = mode.tasks_of(row)
        final = final_stages(row) if on_stage_done is not None else {}
        task: Task | None = None
        try:
            with torch.no_grad():  # chunks switch gradients on where they build their graphs
                for index, task in enumerate(tasks):
                    run.run(task)
                    if on_stage_done is not None:
                        for stage in final.get(index, ()):
                            on_stage_done(stage)
            task = None
            self._transport.finish()
        except Exception as error:
            where = f"in {task.step}" if task is not None else "after its last action"
            raise self._failed(f"PP rank {self._rank} failed {where}", error) from error
        return run

    def _failed(self, what: str, error: Exception) -> PipelineError:
        """Clean up, tell the other ranks or learn from them what happened, and say it."""
        self._transport.abandon()
        self._tools.queue.clear()
        if not isinstance(error, PeerLostError):
            self._transport.report(f"{what}:\n{''.join(traceback.format_exception(error))}")
            return PipelineError(what)
        reports = self._transport.reports()
        told = "".join(f"\nwhat another rank reported: {report.rstrip()}" for report in reports)
        return PipelineError(f"{what}: {error}{told}")

    def _measure(self, laps: Sequence[Lap]) -> None:
        """Tell the meter how long everything took, and leave the spans."""
        self.spans = []
        self.busy_seconds = 0.0
        if not (self._fill or self.record):
            return
        place, seconds = self._training.place, self._tools.clock.seconds
        for index, lap in enumerate(laps):
            waited = sum([seconds(begin, end) for _, begin, end in lap.waits])
            took = seconds(lap.start, lap.end) - waited
            self.busy_seconds += took
            self._meter.note(lap.step, waited, took, early=index < place[lap.step])
            if self.record:
                self._leave_spans(laps[0].start, lap, took)

    def _leave_spans(self, origin: Any, lap: Lap, took: float) -> None:
        """A step computes from the end of its first wait; what it waits later, inside a pair, is no part of it."""
        end = self._tools.clock.seconds(origin, lap.end)
        self.spans.append(Span(self._rank, COMPUTE, str(lap.step), end - took, end))
        for message, begin, until in lap.waits:
            start = self._tools.clock.seconds(origin, begin)
            self.spans.append(Span(self._rank, WAITS, str(message), start, self._tools.clock.seconds(origin, until)))


def final_stages(row: Sequence[Step]) -> dict[int, list[int]]:
    """Which stages' gradients are final after which step of a rank's row: after their last W or B."""
    last = {a.stage: i for i, step in enumerate(row) for a in parts(step) if a.kind in (Kind.W, Kind.B)}
    final: dict[int, list[int]] = {}
    for stage, index in last.items():
        final.setdefault(index, []).append(stage)
    return final
