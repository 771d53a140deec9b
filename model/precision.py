"""The one precision seam: every module asks it for the products with its weight (by its name, since in FP8 the
modules differ).

Parameters are kept in FP32 (FP64 in exactness tests) and are the master weights. A precision computes with copies
in its own dtype, made once per step (`refresh` after the optimizer), not once per micro-batch.

Each product has a hand-written backward: the gradient of the input is returned to autograd, the gradient of the
weight goes to the weight-gradient queue and is accumulated in the parameter's own dtype (see `accumulate`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from model.few_rows import few_rows_grouped_product, few_rows_product
from model.functional import Kernels, swiglu
from model.grads import room_for_grad
from model.products import add_grouped_weight_grads, add_weight_grad, grouped_product, product
from model.protocols import WeightGrads

if TYPE_CHECKING:
    from model.fp8.backend import Backend


class Products(Protocol):
    """The products of one module with its weight."""

    def linear(self, x_TI: Tensor, weight_OI: nn.Parameter, queue: WeightGrads) -> Tensor: ...

    def grouped_linear(
        self, x_RI: Tensor, weight_EOI: nn.Parameter, counts: list[int], queue: WeightGrads
    ) -> Tensor: ...

    def swiglu_linear(
        self,
        gate_up: Tensor,
        gates_R: Tensor | None,
        weight: nn.Parameter,
        counts: list[int] | None,
        kernels: Kernels,
        queue: WeightGrads,
    ) -> Tensor:
        """The linear layer (grouped, if there are counts) of silu(gate) · up [· router gate]."""
        hidden = swiglu(gate_up, gates_R, kernels)
        if counts is None:
            return self.linear(hidden, weight, queue)
        return self.grouped_linear(hidden, weight, counts, queue)

    def copied(self, shape: torch.Size, stored: torch.dtype) -> int:
        """Bytes that are kept beside a weight of that shape and type from its first use until it changes."""
        ...


class Precision(Protocol):
    """dtype = that of the activations."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def wire(self) -> Backend | None:
        """What quantises tokens for their way to the experts; None if they travel as they are."""
        ...

    def of(self, module: str) -> Products:
        """For a module by its name inside a layer, such as "attention_output" (`model/fp8/formats.py` has them)."""
        ...

    def refresh(self) -> None: ...

    def forget(self, weight: nn.Parameter) -> None:
        """This weight is gone: drop what was made of it."""
        ...


class CastPrecision(Products):
    """Computes in FP64, FP32 or BF16 with plain torch matrix products, every module alike.

    compiled   training's products of experts, and all weight gradients, by our C++ kernels where they take the operands
    """

    wire = None

    def __init__(self, dtype: torch.dtype, compiled: bool = False) -> None:
        self.dtype, self.compiled = dtype, compiled
        self._copies: dict[nn.Parameter, Tensor] = {}

    def of(self, module: str) -> CastPrecision:
        return self

    def linear(self, x_TI: Tensor, weight_OI: nn.Parameter, queue: WeightGrads) -> Tensor:
        """x_TI · weightᵀ → [T, O]; any leading dimensions."""
        if not torch.is_grad_enabled():
            copy_OI = self._copy(weight_OI)
            return few_rows_product(x_TI.flatten(0, -2), copy_OI).view(*x_TI.shape[:-1], len(copy_OI))
        return _Linear.apply(x_TI, weight_OI, self._copy(weight_OI), queue, self.compiled)

    def grouped_linear(self, x_RI: Tensor, weight_EOI: nn.Parameter, counts: list[int], queue: WeightGrads) -> Tensor:
        """Rows sorted by expert, `counts[e]` of them for expert e: each block times its expert's weight → [R, O]."""
        if not torch.is_grad_enabled():
            return few_rows_grouped_product(x_RI, self._copy(weight_EOI), counts)
        return _GroupedLinear.apply(x_RI, weight_EOI, self._copy(weight_EOI), counts, queue, self.compiled)

    def copied(self, shape: torch.Size, stored: torch.dtype) -> int:
        return 0 if stored == self.dtype else shape.numel() * self.dtype.itemsize

    def refresh(self) -> None:
        """The weights have changed: forget the copies."""
        self._copies.clear()

    def forget(self, weight: nn.Parameter) -> None:
        self._copies.pop(weight, None)

    def _copy(self, weight: nn.Parameter) -> Tensor:
        if weight.dtype == self.dtype:
            return weight.detach()
        if weight not in self._copies:
            self._copies[weight] = weight.detach().to(self.dtype)
        return self._copies[weight]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, copy_OI: Tensor, queue: WeightGrads, compiled: bool
    ) -> Tensor:
        ctx.save_for_backward(x, copy_OI)
        ctx.weight, ctx.queue, ctx.compiled = weight, queue, compiled
        return product(x.flatten(0, -2), copy_OI).view(*x.shape[:-1], copy_OI.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, copy_OI = ctx.saved_tensors
        weight, compiled = ctx.weight, ctx.compiled
        dy_TO, x_TI = dy.flatten(0, -2), x.flatten(0, -2)

        def wgrad() -> None:
            grad_OI, fresh = room_for_grad(weight)
            add_weight_grad(grad_OI, dy_TO, x_TI, compiled, fresh)

        ctx.queue.put(wgrad)
        dx = product(dy_TO, copy_OI.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None


class _GroupedLinear(torch.autograd.Function):
    """One product per expert on its block of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RI: Tensor,
        weight: nn.Parameter,
        copy_EOI: Tensor,
        counts: list[int],
        queue: WeightGrads,
        compiled: bool,
    ) -> Tensor:
        ctx.save_for_backward(x_RI, copy_EOI)
        ctx.weight, ctx.counts, ctx.queue, ctx.compiled = weight, counts, queue, compiled
        return grouped_product(x_RI, copy_EOI, counts, compiled)

    @staticmethod
    def backward(ctx: Any, dy_RO: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, copy_EOI = ctx.saved_tensors
        weight, counts, compiled = ctx.weight, ctx.counts, ctx.compiled
        dy_RO = dy_RO.contiguous()

        def wgrad() -> None:
            grad_EOI, fresh = room_for_grad(weight)
            add_grouped_weight_grads(grad_EOI, dy_RO, x_RI, counts, compiled, fresh)

        ctx.queue.put(wgrad)
        return grouped_product(dy_RO, copy_EOI.transpose(1, 2), counts, compiled), None, None, None, None, None
