"""`precision=fp8` behind the precision seam: hands every module the format that the table gives it.

State: the weights, quantised once per step and forgotten when they change (`refresh`); and the last input that was
quantised, since the query's and the key-value projection read the same one.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.fp8.backend import Backend
from model.fp8.formats import LINEAR_FORMATS, LinearFormat, complete
from model.fp8.linear import Layer, linear, swiglu_linear
from model.fp8.quantize import E4M3, TILE, Quantized, scale_shape
from model.functional import Kernels
from model.precision import CastPrecision, Products
from model.protocols import WeightGrads


class Fp8Precision:
    """formats: what differs from the report's recipe (`formats.py`). gradient_blocks: the report's ablation.

    Raises ValueError for a module or format that the table does not have.
    """

    dtype = torch.bfloat16

    def __init__(
        self, backend: Backend, formats: Mapping[str, str] | None = None, gradient_blocks: bool = False
    ) -> None:
        self.backend = backend
        self.formats = complete(formats or {})
        self.gradient_blocks = gradient_blocks
        self._high = CastPrecision(self.dtype)
        self._weights: dict[nn.Parameter, Quantized] = {}
        self._last: tuple[weakref.ref[Tensor], int, bool, Quantized] | None = None

    @property
    def wire(self) -> Backend | None:
        return self.backend if self.formats["dispatch"] == "fp8_pow2" else None

    def of(self, module: str) -> Products:
        name = self.formats[module]
        return Fp8Products(self, LINEAR_FORMATS[name]) if name in LINEAR_FORMATS else self._high

    def refresh(self) -> None:
        """The weights have changed: forget what was made of them."""
        self._weights.clear()
        self._high.refresh()
        self._last = None

    def forget(self, weight: nn.Parameter) -> None:
        self._weights.pop(weight, None)
        self._high.forget(weight)

    @torch.no_grad()
    def weight(self, weight: nn.Parameter) -> Quantized:
        """In blocks. Rounded to BF16 first, as ZeRO-1 stores it, so that FP8 weights do not depend on the layout."""
        if weight not in self._weights:
            self._weights[weight] = self.backend.quantize_weight(weight.detach().to(self.dtype))
        return self._weights[weight]

    @torch.no_grad()
    def input(self, x: Tensor, power_of_two: bool) -> Quantized:
        """x [..., K] in tiles [T, K]."""
        if self._last is not None:
            last, version, same_scales, tiles = self._last
            if last() is x and version == x._version and same_scales == power_of_two:
                return tiles
        tiles = self.backend.quantize(x.detach().flatten(0, -2), power_of_two)
        self._last = weakref.ref(x, self._forget_input), x._version, power_of_two, tiles
        return tiles

    def _forget_input(self, gone: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last[0] is gone:
            self._last = None


class Fp8Products(Products):
    """The products of a module whose format is an FP8 one."""

    def __init__(self, precision: Fp8Precision, format: LinearFormat) -> None:
        self.precision, self.format = precision, format

    def linear(self, x_TI: Tensor, weight_OI: nn.Parameter, queue: WeightGrads) -> Tensor:
        return linear(x_TI, self._input(x_TI), self._layer(weight_OI, None, queue))

    def grouped_linear(self, x_RI: Tensor, weight_EOI: nn.Parameter, counts: list[int], queue: WeightGrads) -> Tensor:
        return linear(x_RI, self._input(x_RI), self._layer(weight_EOI, counts, queue))

    def swiglu_linear(
        self,
        gate_up: Tensor,
        gates_R: Tensor | None,
        weight: nn.Parameter,
        counts: list[int] | None,
        kernels: Kernels,
        queue: WeightGrads,
    ) -> Tensor:
        if self.precision.formats["swiglu"] == "bf16":
            return super().swiglu_linear(gate_up, gates_R, weight, counts, kernels, queue)
        return swiglu_linear(gate_up, gates_R, kernels, self._layer(weight, counts, queue))

    def copied(self, shape: torch.Size, stored: torch.dtype) -> int:
        """E4M3 values with the FP32 scales of their blocks, whatever the weight is stored in."""
        scales = torch.Size(scale_shape(tuple(shape), TILE))
        return shape.numel() * E4M3.itemsize + scales.numel() * torch.float32.itemsize

    def _input(self, x: Tensor) -> Quantized:
        return self.precision.input(x, self.format.power_of_two_input)

    def _layer(self, weight: nn.Parameter, counts: list[int] | None, queue: WeightGrads) -> Layer:
        p = self.precision
        return Layer(p.backend, self.format, weight, p.weight(weight), counts, queue, p.gradient_blocks)
