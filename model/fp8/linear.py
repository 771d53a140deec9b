"""Linear layers whose three products are FP8, written against `backend.py`.

What is kept for backward is FP8: the input as its tiles (or as E5M6), and from I to W the gradient, transposed. The
quantised weight is the precision's, made once per step, and serves Fprop and, transposed, Dgrad: blocks of 128×128 stay
blocks. What comes out of each product, and what autograd hands from layer to layer, is BF16.

    forward   x → tiles → Fprop → y
    I         dy → tiles → Dgrad → dx;   dy → 128×1 tiles, put aside
    W         x from its 1×128 tiles to 128×1 tiles; Wgrad, added to the FP32 gradient

The layer after a SwiGLU keeps the SwiGLU's inputs in FP8 instead of its own, and makes its own again from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.fp8.backend import Backend
from model.fp8.e5m6 import pack, unpack
from model.fp8.formats import LinearFormat
from model.fp8.quantize import E8M0, Quantized, pad_groups
from model.fp8.reference import swiglu
from model.functional import Kernels
from model.grads import grad_of
from model.protocols import WeightGrads


@dataclass(frozen=True)
class Layer:
    """One linear layer in use: its weight, quantised; for grouped weights [E, N, K] the rows of each expert.

    gradient_blocks   quantise dy in blocks of 128×128 instead of tiles: the report's ablation
    """

    backend: Backend
    format: LinearFormat
    weight: nn.Parameter
    quantized: Quantized
    counts: list[int] | None
    queue: WeightGrads
    gradient_blocks: bool = False

    def product(self, a: Quantized, b: Quantized) -> Tensor:
        """Fprop or Dgrad, in BF16."""
        if self.counts is None:
            return self.backend.gemm(a, b)
        return self.backend.grouped_gemm(a, b, self.counts)

    def quantize_gradient(self, dy: Tensor) -> tuple[Quantized, Quantized]:
        """For Dgrad, and transposed for Wgrad.

        A gradient with power-of-two scales has been, or might have been, quantised for its journey; so that the result
        does not depend on the layout, Wgrad is made from what the journey leaves in either case.
        """
        backend, power_of_two = self.backend, self.format.power_of_two_gradient
        if self.gradient_blocks:
            padded = pad_groups(dy, [len(dy)] if self.counts is None else self.counts)
            return backend.quantize_weight(dy), backend.quantize_weight(padded).transposed()
        tiles = backend.quantize(dy, power_of_two)
        if power_of_two:
            return tiles, backend.requantize_transposed(tiles, self.counts, True)
        return tiles, backend.quantize_transposed(dy, self.counts)

    def backward(self, dy: Tensor, transposed_input: Callable[[], Quantized], needs_dx: bool) -> Tensor | None:
        """Dgrad now, Wgrad when the queue says so."""
        tiles, dy_NP = self.quantize_gradient(dy)

        def wgrad() -> None:
            grad = grad_of(self.weight)
            if self.counts is None:
                self.backend.add_wgrad(grad, dy_NP, transposed_input())
            else:
                self.backend.add_grouped_wgrad(grad, dy_NP, transposed_input(), self.counts)

        self.queue.put(wgrad)
        return self.product(tiles, self.quantized.transposed()) if needs_dx else None

    def keep(self, x: Tensor, tiles: Quantized) -> tuple[Tensor, ...]:
        """The tensors to save of an input x [T, K], the scales last; powers of two as one byte each."""
        kept = pack(x, tiles) if self.format.keeps_e5m6 else (tiles.values, tiles.scales)
        return (*kept[:-1], kept[-1].to(E8M0)) if self.format.power_of_two_input else kept

    def transpose_kept(self, kept: tuple[Tensor, ...]) -> Quantized:
        """The input for Wgrad, from what `keep` returned."""
        scales = kept[-1].float()
        if self.format.keeps_e5m6:
            return self.backend.quantize_transposed(unpack(kept[0], kept[1], scales), self.counts, True)
        tiles = Quantized(kept[0], scales)
        return self.backend.requantize_transposed(tiles, self.counts, self.format.power_of_two_input)


def linear(x: Tensor, tiles: Quantized, layer: Layer) -> Tensor:
    """x · weightᵀ: x [..., K], of which `tiles` are [T, K] → [..., N]."""
    return _Linear.apply(x, layer.weight, tiles, layer)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, tiles: Quantized, layer: Layer) -> Tensor:
        ctx.save_for_backward(*layer.keep(x.flatten(0, -2), tiles))
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(tiles, layer.quantized).view(*x.shape[:-1], layer.weight.shape[-2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer, kept = ctx.layer, ctx.saved_tensors
        dx = layer.backward(dy.flatten(0, -2), lambda: layer.transpose_kept(kept), ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape), None, None, None


def swiglu_linear(gate_up: Tensor, gates_R: Tensor | None, kernels: Kernels, layer: Layer) -> Tensor:
    """The linear layer of silu(gate) · up [· router gate]: gate_up [..., 2F] → [..., N]."""
    return _SwiGLULinear.apply(gate_up, gates_R, layer.weight, kernels, layer)


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, gates: Tensor | None, weight: nn.Parameter, kernels: Kernels, layer: Layer
    ) -> Tensor:
        flat = gate_up.flatten(0, -2)
        kept = layer.backend.quantize(flat)
        ctx.save_for_backward(kept.values, kept.scales, gates)
        ctx.layer, ctx.kernels, ctx.shape = layer, kernels, gate_up.shape
        hidden = layer.backend.swiglu_quantize(flat, gates, layer.format.power_of_two_input)
        return layer.product(hidden, layer.quantized).view(*gate_up.shape[:-1], weight.shape[-2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        values, scales, gates = ctx.saved_tensors
        layer = ctx.layer
        gate_up = Quantized(values, scales).dequantize(dy.dtype)
        hidden_KP = layer.backend.quantize_transposed(
            swiglu(gate_up, gates), layer.counts, layer.format.power_of_two_input
        )
        dhidden = layer.backward(dy.flatten(0, -2), lambda: hidden_KP, True)
        dgate_up, dgates = ctx.kernels.swiglu_backward(dhidden, gate_up, gates)
        return dgate_up.view(ctx.shape), dgates, None, None, None
