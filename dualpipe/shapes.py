"""Which shapes travel between plain torch modules: found out before the first message, without computing anything.

Each stage's module is run on fake tensors, which have a shape and a dtype but no data; no parameter, buffer or random
state changes. The rank that holds a stage tells the others what comes out of it, and so on to the last but one stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualpipe.schedule import Schedule
from dualpipe.stage import TensorSpec

Specs = tuple[TensorSpec, ...]


class ShapeError(RuntimeError):
    """A stage's module does not run on the shapes that it would get; the message is that of the module."""


def spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def infer_specs(
    modules: Mapping[int, nn.Module],
    schedule: Schedule,
    rank: int,
    group: dist.ProcessGroup | None,
    inputs: Specs,
    device: torch.device,
) -> tuple[Specs, ...]:
    """What each stage gets (entry s) from the stage before, for one micro-batch of these inputs.

    Collective over the group; every rank gets the same answer, or the same ShapeError.
    """
    found = [inputs]
    for stage in range(schedule.num_stages - 1):
        owner = schedule.placement[0][stage]
        answer: list[Any] = [None]
        if owner == rank:
            answer[0] = _outputs_of(stage, modules[stage], found[-1], device)
        if group is not None:
            dist.broadcast_object_list(answer, src=dist.get_global_rank(group, owner), group=group, device=device)
        if isinstance(answer[0], str):
            raise ShapeError(answer[0])
        found.append(answer[0])
    return tuple(found)


def _outputs_of(stage: int, module: nn.Module, inputs: Specs, device: torch.device) -> Specs | str:
    """The specs of a module's outputs, or what went wrong."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # torch's own shape propagation; not a public name yet

    shapes = ", ".join(f"{list(s.shape)} {s.dtype}" for s in inputs)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
            state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            fakes: dict[str, Tensor] = {name: fake.from_tensor(tensor) for name, tensor in state.items()}
            arguments = tuple(torch.empty(s.shape, dtype=s.dtype, device=device) for s in inputs)
            outputs = as_tuple(torch.func.functional_call(module, fakes, arguments))
            return tuple(spec_of(output) for output in outputs)
    except Exception as error:
        return (
            f"stage {stage} ({type(module).__name__}) does not give tensors of a known shape on inputs of {shapes}: "
            f"{type(error).__name__}: {error}. If its shapes depend on data, wrap it in a Stage with its own "
            f"output_spec (dualpipe/stage.py)"
        )
