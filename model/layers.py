"""The modules that hold parameters: Linear, GroupedLinear, RMSNorm, Embedding.

Each asks the toolbox for how to compute: the precision seam, and the queue for weight gradients. Parameters are
created empty and filled by `model/init.py`, by global name, so that every layout starts from the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.balance import NO_BALANCE, Balance
from model.functional import Kernels, embed, make_kernels, rms_norm
from model.precision import Precision
from model.protocols import Dispatcher, WeightGrads


@dataclass(frozen=True)
class Toolbox:
    """What the modules compute and communicate with; dtype and device are those of the parameters.

    balance   how routers are kept in balance besides their bias
    placement   by layer, the order in which its experts are dealt out to the ranks; a layer that is not in it deals
                them out as 0, 1, 2, …
    compile   training: norms, SwiGLU, the loss, attention and the choice of experts through our C++ kernels on a CPU
              with AVX-512; elsewhere norms and SwiGLU through torch.compile (products are the precision's:
              `CastPrecision.compiled`)
    cpp       generation in FP32 on a CPU uses the C++ kernels of model/cpu (`fused.py`)
    """

    precision: Precision
    queue: WeightGrads
    dispatcher: Dispatcher
    param_dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"
    balance: Balance = NO_BALANCE
    placement: Mapping[int, Sequence[int]] = field(default_factory=dict)
    compile: bool = False
    cpp: bool = False

    def parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self.param_dtype, device=self.device))


class Linear(nn.Module):
    """y = x · weightᵀ; weight [out, in]. `name` is the module's in the table of formats."""

    def __init__(self, inputs: int, outputs: int, tools: Toolbox, name: str) -> None:
        super().__init__()
        self.tools = tools
        self.products = tools.precision.of(name)
        self.weight = tools.parameter(outputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.products.linear(x, self.weight, self.tools.queue)

    def of_swiglu(self, gate_up: Tensor, kernels: Kernels) -> Tensor:
        """The same of silu(gate) · up."""
        return self.products.swiglu_linear(gate_up, None, self.weight, None, kernels, self.tools.queue)


class GroupedLinear(nn.Module):
    """One weight per expert: weight [experts, out, in]; rows come sorted by expert."""

    def __init__(self, experts: int, inputs: int, outputs: int, tools: Toolbox, name: str) -> None:
        super().__init__()
        self.tools = tools
        self.products = tools.precision.of(name)
        self.weight = tools.parameter(experts, outputs, inputs)

    def forward(self, x_RI: Tensor, counts: list[int]) -> Tensor:
        return self.products.grouped_linear(x_RI, self.weight, counts, self.tools.queue)

    def of_swiglu(self, gate_up: Tensor, gates_R: Tensor, counts: list[int], kernels: Kernels) -> Tensor:
        """The same of silu(gate) · up · router gate."""
        return self.products.swiglu_linear(gate_up, gates_R, self.weight, counts, kernels, self.tools.queue)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, tools: Toolbox) -> None:
        super().__init__()
        self.eps = eps
        self.weight = tools.parameter(size)
        self.kernels = make_kernels(tools.compile, tools.cpp)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.kernels)


class Embedding(nn.Module):
    def __init__(self, vocab: int, size: int, tools: Toolbox) -> None:
        super().__init__()
        self.tools = tools
        self.weight = tools.parameter(vocab, size)

    def forward(self, tokens: Tensor) -> Tensor:
        return embed(tokens, self.weight, self.tools.precision.dtype, self.tools.queue)
