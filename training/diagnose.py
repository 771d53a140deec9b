"""Which layer made the first number that is not finite?

The micro-batches are run forward once more with an eye on every module's output. If all of them are finite, the
gradient went wrong in the backward, which runs from the last layer to the first: then the last parameter in the order
of the model whose gradient is not finite is nearest to the cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.batch import MicroBatch
from parallel.build import Replica
from training.step import evaluate

Finding = tuple[int, int, str]  # stage, place in the stage, words


def find_culprit(replica: Replica, micro_batches: Sequence[MicroBatch]) -> str:
    """A sentence that names the layer. Collective; the same on every rank."""
    mine = (_first_bad_outputs(replica, micro_batches), _bad_gradients(replica))
    everybody = [mine] * replica.mesh.layout.world
    if replica.mesh.control is not None:
        dist.all_gather_object(everybody, mine, group=replica.mesh.control)
    forward = [finding for found, _ in everybody for finding in found]
    if forward:
        return min(forward)[2]
    backward = [finding for _, found in everybody for finding in found]
    return max(backward)[2] if backward else "all outputs and gradients are finite again"


def _first_bad_outputs(replica: Replica, micro_batches: Sequence[MicroBatch]) -> list[Finding]:
    """Per stage of this rank, the first module whose output is not finite."""
    found: dict[int, Finding] = {}
    handles = []

    def watch(number: int, place: int, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            if number not in found and any(isinstance(p, Tensor) and not _finite(p) for p in parts):
                found[number] = (number, place, f"the output of {name} is not finite, on rank {replica.mesh.rank}")

        return look

    for number, stage in replica.stages.items():
        for place, (name, module) in enumerate(stage.named_modules()):
            if not list(module.children()):
                handles.append(module.register_forward_hook(watch(number, place, name)))
    try:
        evaluate(replica, micro_batches)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def _bad_gradients(replica: Replica) -> list[Finding]:
    """The parameters of this rank whose gradient is not finite."""
    places = {
        parameter: (number, place)
        for number, stage in replica.stages.items()
        for place, parameter in enumerate(stage.parameters())
    }
    return [
        (*places[parameter], f"the gradient of {name} is not finite, on rank {replica.mesh.rank}")
        for bucket in replica.buckets
        for (parameter, name), (_, start) in zip(bucket.names(), bucket.offsets(), strict=True)
        if not _finite(bucket.grads[start : start + parameter.numel()])
    ]


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
