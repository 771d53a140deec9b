"""What happens to the gradients of a step: summed over copies, measured, and turned into new weights.

    stage_done(stage) …    a stage's gradients are final: their sum starts, under the rest of the pipeline
    finish_reduction()     wait for all of them
    gradient_norm()        of the whole model, the same number on every rank
    step(rate, scale)      the optimizer, on the gradients times `scale`

Two ways to do it. `ReplicatedUpdate` (ZeRO stage 0): every copy sums everything and updates everything.
`parallel.zero.ShardedUpdate` (ZeRO stage 1): every copy gets the sum of its own share only, updates that share, and
the new weights are gathered. Losses are already divided by the number of targets in the global batch, so gradients
are summed and never averaged.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.buckets import GradBucket
from parallel.mesh import Mesh

ParamGroup = dict[str, Any]  # as in torch.optim: params, weight_decay, and the bucket they came from


class FlatOptimizer(Protocol):
    """A torch.optim.Optimizer whose state can be made before the first step."""

    param_groups: list[ParamGroup]
    state: Any

    def init_state(self) -> None: ...

    def step(self) -> Any: ...


OptimizerFactory = Callable[[list[ParamGroup]], FlatOptimizer]


@dataclass(frozen=True)
class Shard:
    """The part of a bucket whose optimizer state this rank holds.

    held     that part
    master   its weights, FP32 or better [held]
    moments  the optimizer's tensors of the same size, by name
    """

    bucket: GradBucket
    held: slice
    master: Tensor
    moments: dict[str, Tensor]

    def owned(self, tensor: Tensor) -> Tensor:
        """The part of master or a moment that this rank alone is responsible for (bucket.share)."""
        return tensor[self.bucket.share.start - self.held.start : self.bucket.share.stop - self.held.start]


class Update(ABC):
    """The common part. `updates` counts the optimizer's steps; `optimizer` holds one flat parameter per bucket."""

    def __init__(self, buckets: Sequence[GradBucket], mesh: Mesh) -> None:
        self.buckets = tuple(buckets)
        self.mesh = mesh
        self.updates = 0
        self.before_change: list[Callable[[], None]] = []  # called before weights change: somebody may be reading
        self.record = False
        self.spans: list[tuple[str, float, float, float]] = []  # label, start, start and end of waiting: host seconds
        self._works: dict[int, Any] = {}
        self._started: dict[int, float] = {}
        self._unfinished: list[set[int]] = [set(b.stages) for b in self.buckets]

    shards: list[Shard]
    optimizer: FlatOptimizer

    def zero_gradients(self) -> None:
        for bucket in self.buckets:
            bucket.grads.zero_()
        self._unfinished = [set(bucket.stages) for bucket in self.buckets]

    def stage_done(self, stage: int) -> None:
        """The gradients of a stage are final: start to sum what can be summed now, under the rest of the pipeline.

        In the order of the buckets, which is the same on all copies: a bucket waits for those before it.
        """
        for stages in self._unfinished:
            stages.discard(stage)
        for index, stages in enumerate(self._unfinished):
            if stages:
                return
            self._start(index)

    def finish_reduction(self) -> None:
        """Start what has not been started, and wait for everything."""
        self.spans = []
        for index in range(len(self.buckets)):
            self._start(index)
        for index, work in self._works.items():
            waiting = time.perf_counter()
            if work is not None:
                work.wait()
            if self.record and work is not None:
                bucket = self.buckets[index]
                label = f"{'experts' if bucket.routed else 'dense'}, stage {'+'.join(map(str, bucket.stages))}"
                self.spans.append((label, self._started[index], waiting, time.perf_counter()))
        self._works.clear()

    def _start(self, index: int) -> None:
        if index not in self._works:
            self._started[index] = time.perf_counter()
            self._works[index] = self._reduce(self.buckets[index])

    def gradient_norm(self) -> float:
        """Each rank measures its own shares, so every element counts once, in FP64.

        It is NaN if anything that any rank's optimizer will read is not finite. Copies should be alike; if one has gone
        wrong after the sum, in a part that another rank measures, this is where it is noticed before it is used.
        """
        square = torch.zeros((), dtype=torch.float64, device=self.buckets[0].grads.device)
        for bucket in self.buckets:
            square += torch.linalg.vector_norm(bucket.grads[bucket.share], dtype=torch.float64).square()
            if (used := self._used(bucket)) != bucket.share:
                largest = torch.linalg.vector_norm(bucket.grads[used], ord=math.inf)
                square += largest.double() * 0.0  # zero, or NaN for infinity and NaN
        if self.mesh.layout.world > 1:
            dist.all_reduce(square)
        return float(square.sqrt())

    def step(self, rate: float, scale: float = 1.0) -> None:
        """Update the weights with the reduced gradients times `scale`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)
        if scale != 1.0:
            for bucket in self.buckets:
                bucket.grads[self._used(bucket)].mul_(scale)
        for wait in self.before_change:
            wait()
        self._apply()
        self.updates += 1

    def restore_counters(self, updates: int) -> None:
        """After loading a checkpoint: how many updates the moments have seen."""
        self.updates = updates
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(updates)

    def close(self) -> None:  # noqa: B027 - nothing to give back unless a subclass has something
        """Let go of everything that must be gone before the process group."""

    @abstractmethod
    def publish(self) -> None:
        """Make the model's weights those of the owned masters, on every copy; collective."""

    @abstractmethod
    def _reduce(self, bucket: GradBucket) -> Any: ...

    @abstractmethod
    def _apply(self) -> None: ...

    @abstractmethod
    def _used(self, bucket: GradBucket) -> slice:
        """The part of the reduced gradients that this rank's optimizer reads."""


class ReplicatedUpdate(Update):
    """ZeRO stage 0: the weights of a bucket are one flat tensor, of which the parameters are views."""

    def __init__(self, buckets: Sequence[GradBucket], mesh: Mesh, make: OptimizerFactory) -> None:
        super().__init__(buckets, mesh)
        flats = [flatten_weights(bucket) for bucket in self.buckets]
        for flat, bucket in zip(flats, self.buckets, strict=True):
            flat.grad = bucket.grads
        self.optimizer = make([param_group(i, b, f) for i, (b, f) in enumerate(zip(self.buckets, flats, strict=True))])
        self.optimizer.init_state()
        self.shards = [
            Shard(bucket, slice(0, flat.numel()), flat.detach(), moments_of(self.optimizer, flat))
            for flat, bucket in zip(flats, self.buckets, strict=True)
        ]

    def _reduce(self, bucket: GradBucket) -> Any:
        return None if bucket.group is None else dist.all_reduce(bucket.grads, group=bucket.group, async_op=True)

    def _apply(self) -> None:
        self.optimizer.step()

    def _used(self, bucket: GradBucket) -> slice:
        return slice(0, bucket.grads.numel())

    def publish(self) -> None:
        for shard in self.shards:
            if shard.bucket.group is not None:
                mine = shard.owned(shard.master).clone()
                gather_flat(shard.master, mine, shard.bucket.group)


def flatten_weights(bucket: GradBucket) -> torch.nn.Parameter:
    """One flat parameter of the bucket's size, of which the bucket's parameters become views."""
    first = bucket.parameters[0]
    flat = torch.zeros(bucket.grads.numel(), dtype=first.dtype, device=first.device)
    for parameter, start in bucket.offsets():
        view = flat[start : start + parameter.numel()].view_as(parameter)
        view.copy_(parameter.detach())
        parameter.data = view
    return torch.nn.Parameter(flat)


def param_group(number: int, bucket: GradBucket, *parameters: torch.nn.Parameter) -> ParamGroup:
    return {"params": list(parameters), "bucket": bucket, "number": number}


def moments_of(optimizer: FlatOptimizer, flat: Tensor) -> dict[str, Tensor]:
    """The tensors of an optimizer's state that have one element per weight."""
    state = optimizer.state[flat]
    return {name: t for name, t in state.items() if isinstance(t, Tensor) and t.shape == flat.shape}


def gather_flat(out: Tensor, mine: Tensor, group: dist.ProcessGroup) -> None:
    """All shares, one after the other, into `out`."""
    dist.all_gather_single(out, mine, group=group)
