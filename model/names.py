"""Global names: the same tensor has the same name under every layout.

A module's parameter name already carries the global layer number. Routed experts are stored stacked, [local
experts, out, in]; under their global names they are single matrices, `layers.3.experts.17.gate_up.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from model.layer import Experts
from model.router import Router


def named_tensors(stage: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """(global name, tensor, local name) of all parameters and persistent buffers.

    Tensors of routed experts are views into the stacked parameter, so writing to them writes the model.
    """
    numbers = {name: module.numbers for name, module in stage.named_modules() if isinstance(module, Experts)}
    for local, tensor in stage.state_dict(keep_vars=True).items():
        prefix = next((p for p in numbers if local.startswith(p + ".")), None)
        if prefix is None:
            yield local, tensor, local
        else:
            for expert, view in zip(numbers[prefix], tensor.detach(), strict=True):
                yield f"{prefix}.{expert}{local[len(prefix) :]}", view, local


def expert_parameters(stage: nn.Module) -> set[str]:
    """The local names of the parameters that belong to routed experts."""
    prefixes = tuple(n + "." for n, m in stage.named_modules() if isinstance(m, Experts))
    return {name for name, _ in stage.named_parameters() if prefixes and name.startswith(prefixes)}


def named_routers(stage: nn.Module) -> dict[str, Router]:
    """The routers of a stage by the global name of their layer, in the order of the layers; MTP's are among them."""
    return {name.rpartition(".")[0]: m for name, m in stage.named_modules() if isinstance(m, Router)}
