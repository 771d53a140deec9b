"""One pass of one rank over its row of a schedule: the chunks that live, the results between stages, the losses.

Before a step the receives are posted that will be needed soon; after it the sends are let go that are surely over. A
message is waited for when the first piece of work that reads it is due, and not before: the forward of a pair does
not wait for the gradient of its backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from dualpipe.chunk import Chunk
from dualpipe.clock import Clock
from dualpipe.lanes import Lanes
from dualpipe.messages import Cargo, Message, plan_messages
from dualpipe.outline import Outline, Outlines
from dualpipe.overlap import Side
from dualpipe.p2p import Transport
from dualpipe.schedule import Action, Kind, Schedule, Step, parts
from dualpipe.stage import Segment, Stage, TensorSpec
from dualpipe.wgrad import WeightGradQueue

Handoff = tuple[Tensor, ...]
Key = tuple[int, int]  # stage, micro-batch


@dataclass(frozen=True, slots=True)
class Part:
    """One action with all that running it needs to know, looked up beforehand.

    incoming, outgoing   the messages that it waits for and that its result goes out with; None: it stays here
    source, result       under which names its input was left here, and its result is left, when it stays here
    """

    action: Action
    key: Key
    incoming: Message | None
    outgoing: Message | None
    source: Action
    result: Action


@dataclass(frozen=True, slots=True)
class Task:
    """One step: receives to post before it, its parts (F, then B, of a pair), sends to let go after it."""

    step: Step
    posts: tuple[Message, ...]
    parts: tuple[Part, ...]
    releases: tuple[Message, ...]


@dataclass(frozen=True)
class Mode:
    """One rank's row ready to run, for training or forward only. `place` is where a step stands in the row."""

    schedule: Schedule
    row: tuple[Step, ...]
    tasks: tuple[Task, ...]
    training: bool

    @cached_property
    def place(self) -> dict[Step, int]:
        return {step: index for index, step in enumerate(self.row)}

    def tasks_of(self, row: tuple[Step, ...]) -> Sequence[Task]:
        """The tasks of the row's steps in another order."""
        return self.tasks if row is self.row else [self.tasks[self.place[step]] for step in row]


def make_mode(schedule: Schedule, rank: int, training: bool) -> Mode:
    plan = plan_messages(schedule, rank)

    def part(action: Action) -> Part:
        previous, kind = (-1, Kind.F) if action.kind is Kind.F else (1, Kind.I)  # B leaves its gradient under I too
        return Part(
            action,
            (action.stage, action.micro_batch),
            plan.incoming.get(action),
            plan.outgoing.get(action),
            source=Action(kind, action.stage + previous, action.micro_batch),
            result=Action(kind, action.stage, action.micro_batch),
        )

    row = schedule.steps[rank]
    tasks = [Task(s, plan.posts.get(s, ()), tuple(map(part, parts(s))), plan.releases.get(s, ())) for s in row]
    return Mode(schedule, row, tuple(tasks), training)


class Lap:
    """When a step began and ended, and its waits for messages in between; marks of a `Clock`."""

    __slots__ = ("end", "start", "step", "waits")

    def __init__(self, step: Step, start: Any) -> None:
        self.step, self.start, self.end = step, start, start
        self.waits: list[tuple[Message, Any, Any]] = []


@dataclass(frozen=True)
class Tools:
    """What all passes of a runtime share."""

    queue: WeightGradQueue
    overlap: bool
    device: torch.device
    clock: Clock
    lanes: Lanes
    outlines: Outlines = field(default_factory=Outlines)


class Pass:
    """The state of one pass. `losses` by micro-batch; `peak_activations` as `timeline.py` counts them."""

    def __init__(
        self,
        mode: Mode,
        stages: Mapping[int, Stage],
        micro_batches: Sequence[Any],
        transport: Transport,
        tools: Tools,
    ) -> None:
        self._stages = stages
        self._micro_batches = micro_batches
        self._transport = transport
        self._tools = tools
        self._clock = tools.clock
        self._training = mode.training
        self._last_stage = mode.schedule.num_stages - 1
        self._chunks: dict[Key, Chunk] = {}
        self._local: dict[Action, Handoff] = {}  # what a stage left for a neighbour on this rank
        self.losses: dict[int, Tensor] = {}
        self.peak_activations = 0
        self.laps: list[Lap] = []

    def run(self, task: Task) -> None:
        for message in task.posts:
            self._transport.post(message, self._spec(message))
        lap = Lap(task.step, self._clock.mark())
        self.laps.append(lap)
        first = task.parts[0]
        kind = first.action.kind
        if len(task.parts) > 1:
            self._pair(*task.parts)
        elif kind is Kind.F:
            self._forward(first)
        elif kind is Kind.W:
            self._weights(first)
        else:
            self._backward(first)
        lap.end = self._clock.mark()
        for message in task.releases:
            self._transport.release(message)

    # -- one action, or a pair ---------------------------------------------------------------------------------

    def _forward(self, part: Part) -> None:
        segments = self._segments(part)
        outline = self._tools.outlines.of(segments)  # before its message is waited for
        chunk = self._open(part, segments, outline)
        for piece in outline.forward:
            chunk.run(piece, lambda: self._send_outputs(part, chunk))
        if not self._training:
            self._drop(part)

    def _backward(self, part: Part) -> None:
        whole = part.action.kind is Kind.B
        chunk = self._turn(part)
        for piece in chunk.outline.backward if whole else chunk.outline.inputs:
            chunk.run(piece, lambda: self._send_gradients(part, chunk))
        if whole:
            self._drop(part)

    def _weights(self, part: Part) -> None:
        chunk = self._chunks[part.key]
        for piece in chunk.outline.weights:
            chunk.weights(piece.index)
        self._drop(part)

    def _pair(self, forward: Part, backward: Part) -> None:
        if not self._tools.overlap:
            self._forward(forward)
            self._backward(backward)
            return
        segments = self._segments(forward)
        outline = self._tools.outlines.of(segments)
        opened: Chunk | None = None
        turned: Chunk | None = None
        for side, piece in self._tools.outlines.pair(outline, self._chunks[backward.key].outline):
            if side is Side.BACKWARD:
                turned = turned or self._turn(backward)  # only now are its messages waited for
                turned.run(piece, partial(self._send_gradients, backward, turned))
            else:
                opened = opened or self._open(forward, segments, outline)
                opened.run(piece, partial(self._send_outputs, forward, opened))
        self._drop(backward)

    # -- where chunks begin and end ----------------------------------------------------------------------------

    def _open(self, part: Part, segments: Sequence[Segment], outline: Outline) -> Chunk:
        """Make the chunk of a forward, with its inputs."""
        inputs = self._take(part) if part.action.stage > 0 else ()
        chunk = Chunk(part.key, segments, inputs, self._tools.queue, self._training, self._tools.lanes, outline)
        self._chunks[part.key] = chunk
        self.peak_activations = max(self.peak_activations, len(self._chunks))
        return chunk

    def _send_outputs(self, part: Part, chunk: Chunk) -> None:
        """Send the outputs on, or keep the loss."""
        outputs = chunk.outputs()
        if part.action.stage == self._last_stage:
            self.losses[part.action.micro_batch] = outputs[0].detach()
        else:
            self._give(part, outputs)

    def _turn(self, part: Part) -> Chunk:
        """Seed the chunk of a backward with the gradients of its outputs."""
        chunk = self._chunks[part.key]
        if part.action.stage == self._last_stage:
            chunk.seed((torch.ones_like(self.losses[part.action.micro_batch]),))
            return chunk
        specs = self._stages[part.action.stage].output_spec(self._micro_batches[part.action.micro_batch])
        received = iter(self._take(part))
        chunk.seed([next(received) if spec.has_gradient else None for spec in specs])
        return chunk

    def _send_gradients(self, part: Part, chunk: Chunk) -> None:
        """Send the gradients of the inputs on; zeros for an input that nothing depends on."""
        if part.action.stage == 0:
            return
        specs = self._stages[part.action.stage].input_spec(self._micro_batches[part.action.micro_batch])
        pairs = zip(chunk.input_grads(len(specs)), specs, strict=True)
        self._give(part, tuple([self._full(grad, spec) for grad, spec in pairs if spec.has_gradient]))

    def _full(self, grad: Tensor | None, spec: TensorSpec) -> Tensor:
        return torch.zeros(spec.shape, dtype=spec.dtype, device=self._tools.device) if grad is None else grad

    def _drop(self, part: Part) -> None:
        del self._chunks[part.key]

    def _segments(self, part: Part) -> Sequence[Segment]:
        return self._stages[part.action.stage].segments(self._micro_batches[part.action.micro_batch])

    # -- results between stages --------------------------------------------------------------------------------

    def _take(self, part: Part) -> Handoff:
        if part.incoming is None:
            return self._local.pop(part.source)
        begin = self._clock.mark()
        received = self._transport.receive(part.incoming)
        self.laps[-1].waits.append((part.incoming, begin, self._clock.mark()))
        return received

    def _give(self, part: Part, tensors: Handoff) -> None:
        if part.outgoing is not None:
            self._transport.send(part.outgoing, tensors)
        else:
            self._local[part.result] = tensors

    def _spec(self, message: Message) -> tuple[TensorSpec, ...]:
        micro_batch = self._micro_batches[message.micro_batch]
        if message.cargo is Cargo.ACTIVATION:
            return self._stages[message.stage + 1].input_spec(micro_batch)
        outputs = self._stages[message.stage - 1].output_spec(micro_batch)
        return tuple(spec for spec in outputs if spec.has_gradient)
