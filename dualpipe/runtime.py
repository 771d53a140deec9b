"""Runs one rank's part of a schedule on real stages.

    pipeline = Pipeline(stages, schedule, rank, links, queue)
    losses = pipeline.step(micro_batches)

Every rank gets the whole list of micro-batches and takes what its stages need of it: tokens on the first stage,
targets on the last, positions everywhere. After the step all weight gradients have been accumulated.

The step is a loop over the plan: post receives that will be needed soon, drop sends that are surely over, wait for
what this step needs, run it, send its results. A failure names the rank, the step's action and the peer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dualpipe.chunk import Chunk
from dualpipe.lanes import Lanes, lanes_for
from dualpipe.messages import Cargo, Message, RankPlan, incoming, outgoing, plan_messages
from dualpipe.overlap import backward_order, forward_order, pair_order, run_piece, weight_order
from dualpipe.p2p import P2P, Links, PeerLostError
from dualpipe.schedule import Action, Kind, Pair, Schedule, Step
from dualpipe.stage import Stage, TensorSpec
from dualpipe.timeline import COMPUTE, Span
from dualpipe.validate import validate
from dualpipe.wgrad import WeightGradQueue

Handoff = tuple[Tensor, ...]


class PipelineError(RuntimeError):
    """A step failed; the message names the rank and the action, the cause is chained."""


@dataclass(frozen=True)
class _Mode:
    """A schedule ready to run: with its message plan, for training or forward only."""

    schedule: Schedule
    plan: RankPlan
    training: bool


class Pipeline:
    """One rank of a pipeline.

    stages    the stages that this rank holds, by number; must be those of `schedule.stages_of(rank)`.
    links     process groups of the pipeline; may be None when the schedule has one rank.
    queue     where the stages' layers put their weight gradients.
    overlap   interleave the two chunks of a pair (else run F, then B).
    timeout   how long a message may take before its sender is given up.

    With `record = True` every step of the schedule leaves a span in `spans`, in seconds of this host's clock.

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
        device: torch.device | None = None,
        timeout: timedelta = timedelta(minutes=5),
    ) -> None:
        validate(schedule)
        self.record = False
        self.spans: list[Span] = []
        if sorted(stages) != list(schedule.stages_of(rank)):
            raise ValueError(
                f"rank {rank} of {schedule.name} holds stages {schedule.stages_of(rank)}; got {sorted(stages)}"
            )
        if links is None and schedule.num_ranks > 1:
            raise ValueError(f"{schedule.name} has {schedule.num_ranks} ranks and needs links between them")
        self._stages = stages
        self._schedule = schedule
        self._rank = rank
        self._queue = queue
        self._overlap = overlap
        self._lanes = lanes_for(device or torch.device("cpu"), overlap)
        links = links or Links({}, (0,))
        self._device = device or torch.device("cpu")
        self._p2p = P2P(links, self._device, timeout)

    @cached_property
    def _training(self) -> _Mode:
        return _Mode(self._schedule, plan_messages(self._schedule, self._rank), True)

    @cached_property
    def _evaluation(self) -> _Mode:
        schedule = self._schedule.forward_only()
        validate(schedule, forward_only=True)
        return _Mode(schedule, plan_messages(schedule, self._rank), False)

    def step(self, micro_batches: Sequence[Any]) -> dict[int, Tensor]:
        """Forward and backward of all micro-batches. Returns the losses that arose on this rank, by micro-batch."""
        return self._run(self._training, micro_batches)

    def evaluate(self, micro_batches: Sequence[Any]) -> dict[int, Tensor]:
        """Forward only, without gradients. Returns the losses that arose on this rank, by micro-batch."""
        return self._run(self._evaluation, micro_batches)

    def _run(self, mode: _Mode, micro_batches: Sequence[Any]) -> dict[int, Tensor]:
        expected = mode.schedule.num_micro_batches
        if len(micro_batches) != expected:
            raise ValueError(f"{mode.schedule.name} was made for {expected} micro-batches; got {len(micro_batches)}")
        run = _Run(mode, self._stages, micro_batches, self._p2p, self._queue, self._overlap, self._lanes)
        self.spans = []
        step: Step | None = None
        try:
            with torch.no_grad():  # chunks switch gradients on where they build their graphs
                for index, step in enumerate(mode.schedule.steps[self._rank]):
                    run.receive(index)
                    if self.record:
                        self._recorded(run, step)
                    else:
                        run.compute(step)
            step = None
            self._p2p.finish()
        except Exception as error:
            self._p2p.abandon()
            self._queue.clear()
            where = f"in {step}" if step is not None else "after its last action"
            detail = f": {error}" if isinstance(error, PeerLostError) else ""
            raise PipelineError(f"PP rank {self._rank} failed {where}{detail}") from error
        return run.losses

    def _recorded(self, run: _Run, step: Step) -> None:
        """Run one step and note when it began and ended; on a GPU this waits for the device."""
        self._synchronize()
        start = time.perf_counter()
        run.compute(step)
        self._synchronize()
        self.spans.append(Span(self._rank, COMPUTE, str(step), start, time.perf_counter()))

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


class _Run:
    """The state of one pass over the schedule: live chunks, results that stay on this rank, losses."""

    def __init__(
        self,
        mode: _Mode,
        stages: Mapping[int, Stage],
        micro_batches: Sequence[Any],
        p2p: P2P,
        queue: WeightGradQueue,
        overlap: bool,
        lanes: Lanes,
    ) -> None:
        self._lanes = lanes
        self._mode = mode
        self._stages = stages
        self._micro_batches = micro_batches
        self._p2p = p2p
        self._queue = queue
        self._overlap = overlap
        self._chunks: dict[tuple[int, int], Chunk] = {}
        self._local: dict[Action, Handoff] = {}  # what a stage left for a neighbour on this rank
        self._arrived: dict[Message, Handoff] = {}
        self.losses: dict[int, Tensor] = {}

    def receive(self, index: int) -> None:
        """Post what will be needed soon, drop what has surely been sent, wait for what step `index` needs now."""
        plan = self._mode.plan
        for message in plan.posts[index]:
            self._p2p.post(message, self._spec(message))
        for message in plan.releases[index]:
            self._p2p.release(message)
        for message in plan.needs[index]:
            self._arrived[message] = self._p2p.receive(message)

    def compute(self, step: Step) -> None:
        if isinstance(step, Pair):
            self._pair(step)
        elif step.kind is Kind.F:
            self._forward(step)
        elif step.kind is Kind.W:
            self._weights(step)
        else:
            self._backward(step)

    # -- one action, or a pair ---------------------------------------------------------------------------------

    def _forward(self, action: Action) -> None:
        chunk = self._open(action)
        for piece in forward_order(chunk.segments):
            run_piece(chunk, piece, lambda: self._close_forward(action, chunk))

    def _backward(self, action: Action) -> None:
        chunk = self._turn(action)
        for piece in backward_order(chunk.segments, weights=action.kind is Kind.B):
            run_piece(chunk, piece, lambda: self._close_backward(action, chunk))

    def _weights(self, action: Action) -> None:
        chunk = self._chunks.pop((action.stage, action.micro_batch))
        for piece in weight_order(chunk.segments):
            run_piece(chunk, piece, lambda: None)

    def _pair(self, pair: Pair) -> None:
        if not self._overlap:
            self._forward(pair.forward)
            self._backward(pair.backward)
            return
        chunks = self._open(pair.forward), self._turn(pair.backward)
        order = pair_order(chunks[0].segments, chunks[1].segments)
        send = (
            lambda: self._close_forward(pair.forward, chunks[0]),
            lambda: self._close_backward(pair.backward, chunks[1]),
        )
        for side, piece in order:
            run_piece(chunks[side], piece, send[side])

    # -- where chunks begin and end ----------------------------------------------------------------------------

    def _open(self, action: Action) -> Chunk:
        """Make the chunk of a forward, with its inputs."""
        micro_batch = self._micro_batches[action.micro_batch]
        segments = self._stages[action.stage].segments(micro_batch)
        previous = Action(Kind.F, action.stage - 1, action.micro_batch)
        inputs = self._take(action, previous) if action.stage > 0 else ()
        key = (action.stage, action.micro_batch)
        return Chunk(key, segments, inputs, self._queue, self._mode.training, self._lanes)

    def _close_forward(self, action: Action, chunk: Chunk) -> None:
        """Send the outputs on, or keep the loss."""
        outputs = chunk.outputs()
        if action.stage == self._mode.schedule.num_stages - 1:
            self.losses[action.micro_batch] = outputs[0].detach()
        else:
            self._give(action, outputs)
        if self._mode.training:
            self._chunks[chunk.key] = chunk

    def _turn(self, action: Action) -> Chunk:
        """Seed the chunk of a backward with the gradients of its outputs."""
        key = (action.stage, action.micro_batch)
        chunk = self._chunks[key] if action.kind is Kind.I else self._chunks.pop(key)
        if action.stage == self._mode.schedule.num_stages - 1:
            chunk.seed((torch.ones_like(self.losses[action.micro_batch]),))
        else:
            later = Action(Kind.I, action.stage + 1, action.micro_batch)
            chunk.seed(self._take(action, later))
        return chunk

    def _close_backward(self, action: Action, chunk: Chunk) -> None:
        if action.stage > 0:
            spec = self._stages[action.stage].input_spec(self._micro_batches[action.micro_batch])
            self._give(action, chunk.input_grads(len(spec)))

    # -- results between stages --------------------------------------------------------------------------------

    def _take(self, action: Action, producer: Action) -> Handoff:
        message = incoming(self._mode.schedule, action)
        return self._local.pop(producer) if message is None else self._arrived.pop(message)

    def _give(self, action: Action, tensors: Handoff) -> None:
        message = outgoing(self._mode.schedule, action)
        if message is not None:
            self._p2p.send(message, tensors)
        else:  # the neighbour stage is here; B and I both leave the gradient under I
            kind = Kind.F if action.kind is Kind.F else Kind.I
            self._local[Action(kind, action.stage, action.micro_batch)] = tensors

    def _spec(self, message: Message) -> tuple[TensorSpec, ...]:
        micro_batch = self._micro_batches[message.micro_batch]
        if message.cargo is Cargo.ACTIVATION:
            return self._stages[message.stage + 1].input_spec(micro_batch)
        return self._stages[message.stage - 1].output_spec(micro_batch)
