"""Pipelines plain torch modules: give each rank its stages and the schedule, then train as with one module.

    schedule = make_schedule("dualpipe", num_ranks=2, num_micro_batches=8)
    pipeline = Pipeline({s: make_stage(s) for s in schedule.stages_of(rank)}, schedule, group)
    losses = pipeline.step(inputs, targets, loss)
    pipeline.reduce_gradients()

A stage's module is called with what the stage before returned: a tensor, or a tuple of them. The first stage gets the
input of the micro-batch, and `loss(output, target)` of the last stage's output is what is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualpipe.linear import defer_linear_weights
from dualpipe.p2p import Links
from dualpipe.runtime import Runtime
from dualpipe.schedule import Kind, Schedule
from dualpipe.shapes import Specs, as_tuple, infer_specs, spec_of
from dualpipe.stage import Segment, compute, inputs_of, outputs_of
from dualpipe.timeline import Span
from dualpipe.wgrad import WeightGradQueue

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Example:
    """One micro-batch: inputs of the first stage, target and loss for the last, what travels into each stage."""

    inputs: tuple[Tensor, ...]
    target: Any
    loss: Loss
    specs: tuple[Specs, ...]


class Pipeline:
    """One rank of a pipeline of torch modules.

    stages         the modules that this rank holds, by number: those of `schedule.stages_of(rank)`. Under DualPipe a
                   stage is on two ranks; start both from equal weights.
    schedule       from `make_schedule`, `read_csv`, `search`, or your own.
    group          its ranks are the pipeline's; default: all processes, or none if there is no process group.
    overlap, fill  see `Runtime`.
    defer_weights  under a schedule with W, plain Linear layers leave their weight gradients to it (`linear.py`).
    timeout        how long a message may take before its sender is given up.

    Raises InvalidScheduleError for a bad schedule and ValueError if stages, schedule and group do not fit.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        schedule: Schedule,
        group: dist.ProcessGroup | None = None,
        *,
        overlap: bool = True,
        fill: bool = True,
        defer_weights: bool = True,
        timeout: timedelta = timedelta(minutes=5),
    ) -> None:
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        size = 1 if group is None else dist.get_world_size(group)
        if size != schedule.num_ranks:
            raise ValueError(f"{schedule.name} was made for {schedule.num_ranks} ranks, the group has {size}")
        self.schedule = schedule
        self.rank = 0 if group is None else dist.get_rank(group)
        self._group = group
        self._modules = dict(stages)
        self._device = next((p.device for m in stages.values() for p in m.parameters()), torch.device("cpu"))
        self._specs: dict[Specs, tuple[Specs, ...]] = {}
        queue = WeightGradQueue()
        if defer_weights and any(a.kind is Kind.W for a in schedule.actions(self.rank)):
            for module in stages.values():
                defer_linear_weights(module, queue)
        links = None
        if group is not None and size > 1:
            links = Links.within(group, timeout, schedule.num_stages, schedule.num_micro_batches)
        last = schedule.num_stages - 1
        shared = len(list(_distinct(stages.values()))) < sum(len(list(m.parameters())) for m in stages.values())
        self._runtime = Runtime(
            {s: ModuleStage(module, s, s == last) for s, module in stages.items()},
            schedule,
            self.rank,
            links,
            queue,
            overlap=overlap,
            fill=fill and not shared,  # moving W would change the order of sums in a parameter of two stages
            device=self._device,
            timeout=timeout,
        )

    def step(self, inputs: Sequence[Any], targets: Sequence[Any], loss: Loss) -> dict[int, Tensor]:
        """Forward and backward of all micro-batches; gradients add up in `.grad`, as ever.

        inputs    per micro-batch a tensor, or a tuple of them; the same list on every rank (a rank that holds no
                  first stage uses their shapes alone, which may differ between micro-batches).
        targets   per micro-batch whatever `loss` takes; used where the last stage is.
        loss      loss(output, target) → scalar. Gradients are those of the sum over the micro-batches; for a mean,
                  divide in `loss`.

        Returns the losses that arose on this rank, by micro-batch. Raises PipelineError if a stage or a peer fails.
        """
        return self._runtime.step(self._examples(inputs, targets, loss))

    def evaluate(self, inputs: Sequence[Any], targets: Sequence[Any], loss: Loss) -> dict[int, Tensor]:
        """Forward alone, without gradients; otherwise like `step`."""
        return self._runtime.evaluate(self._examples(inputs, targets, loss))

    def reduce_gradients(self) -> None:
        """Add up the gradients of stages that live on two ranks; once, after the last `step` before the optimizer's."""
        if self._group is None or self.schedule.num_directions == 1:
            return
        summed: set[int] = set()  # a parameter of two stages, such as tied embeddings, has one gradient
        for stage, ranks in enumerate(zip(*self.schedule.placement, strict=True)):
            other = next((r for r in ranks if r != self.rank), self.rank)
            if self.rank in ranks and other != self.rank:
                for parameter in self._modules[stage].parameters():
                    if parameter.requires_grad and id(parameter) not in summed:
                        summed.add(id(parameter))
                        self._add_of(parameter, other)

    @property
    def peak_activations(self) -> int:
        """The most activations (stages × micro-batches) that were alive at once in the last step on this rank."""
        return self._runtime.peak_activations

    def record(self, on: bool = True) -> None:
        """Whether steps leave their `spans`, for a `Timeline`."""
        self._runtime.record = on

    @property
    def spans(self) -> list[Span]:
        """What this rank did in the last step, in seconds since it began."""
        return self._runtime.spans

    def _examples(self, inputs: Sequence[Any], targets: Sequence[Any], loss: Loss) -> list[Example]:
        expected = self.schedule.num_micro_batches
        if len(inputs) != expected or len(targets) != expected:
            raise ValueError(
                f"{self.schedule.name} was made for {expected} micro-batches; "
                f"got {len(inputs)} inputs and {len(targets)} targets"
            )
        examples = []
        for given, target in zip(inputs, targets, strict=True):
            tensors = as_tuple(given)
            signature = tuple(spec_of(tensor) for tensor in tensors)
            if signature not in self._specs:
                self._specs[signature] = infer_specs(
                    self._modules, self.schedule, self.rank, self._group, signature, self._device
                )
            examples.append(Example(tensors, target, loss, self._specs[signature]))
        return examples

    def _add_of(self, parameter: Tensor, other: int) -> None:
        """Exchange a gradient with the mirror and add; both sides add in the same order, so they stay bit-equal."""
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
        theirs = torch.empty_like(mine)
        peer = dist.get_global_rank(self._group, other)  # type: ignore[arg-type]
        ops = [dist.P2POp(dist.isend, mine, peer, self._group), dist.P2POp(dist.irecv, theirs, peer, self._group)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        parameter.grad = mine + theirs


class ModuleStage:
    """A torch module as a stage of one segment. Implements `Stage`; micro-batches are `Example`s."""

    def __init__(self, module: nn.Module, number: int, is_last: bool) -> None:
        self._module, self._number, self._is_last = module, number, is_last

    def input_spec(self, micro_batch: Example) -> Specs:
        return micro_batch.specs[self._number] if self._number else ()

    def output_spec(self, micro_batch: Example) -> Specs:
        return () if self._is_last else micro_batch.specs[self._number + 1]

    def segments(self, micro_batch: Example) -> Sequence[Segment]:
        def run(*received: Tensor) -> Any:
            result = self._module(*(received if self._number else micro_batch.inputs))
            if not self._is_last:
                return as_result(result)
            return checked_loss(micro_batch.loss(result, micro_batch.target))

        reads = inputs_of(len(self.input_spec(micro_batch)))
        writes = outputs_of(1 if self._is_last else len(self.output_spec(micro_batch)))
        return (compute("module", reads, writes, run),)


def as_result(value: Any) -> Any:
    """A list of outputs as the tuple that a segment returns."""
    return tuple(value) if isinstance(value, list) else value


def checked_loss(value: Any) -> Tensor:
    """A loss that can be differentiated. Raises TypeError or ValueError, as `backward` would."""
    if not isinstance(value, Tensor):
        raise TypeError(f"loss(output, target) must return a tensor; it returned a {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"loss(output, target) must return one number; it returned a tensor of {list(value.shape)}")
    if torch.is_grad_enabled() and not value.requires_grad:
        raise ValueError("loss(output, target) depends on no parameter and no input of its stage: nothing to learn")
    return value


def _distinct(modules: Any) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}
