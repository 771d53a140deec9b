"""`precision.backend=transformer_engine`: the products by NVIDIA's Transformer Engine, for Hopper and later.

Transformer Engine (TE) brings its own Linear and GroupedLinear with the same recipe: E4M3, 1×128 tiles, 128×128 blocks,
promotion, Wgrad from tensors quantised along the tokens. So it takes the place of `Fp8Precision`, not of a backend
beneath it. Each of our weights gets one TE module, which holds a BF16 copy and, made once per step, its FP8 form.

    forward   tokens are padded to multiples of 16 for each expert, which the FP8 products of cuBLAS need
    I         TE's backward gives dx, and puts what Wgrad needs in a queue of the module
    W         our queue calls the module's `backward_dw`, which adds the oldest product waiting to the FP32 gradient

Two rules of TE are met here. `backward_dw` adds only with `fuse_wgrad_accumulation`, into `weight.main_grad`: that is
our gradient, handed over when the backward of the layer begins. And a call with `is_first_microbatch=True` quantises
the weight, but its backward overwrites the gradient: so that call is made once per step on zeros, without a backward,
and every call of the training with False.

What differs from the table of `formats.py`: all scales are powers of two, E5M6 is not kept (the input of the Linear
after the attention is kept in E4M3), and the inputs of a SwiGLU are kept in BF16.

Not run on a GPU so far: tests/test_transformer_engine.py makes every call on TE's own classes, on a CPU, with the
arithmetic of their forward replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from model.fp8.backend import Backend
from model.fp8.formats import LINEAR_FORMATS, complete
from model.fp8.precision import Fp8Precision, Fp8Products
from model.fp8.quantize import TILE
from model.fp8.reference import ReferenceBackend
from model.grads import grad_of
from model.precision import CastPrecision, Products
from model.protocols import WeightGrads

ALIGN = 16
OLDEST = (2, 9)  # the first with `autocast`


class TransformerEnginePrecision:
    """formats: what differs from the report's recipe (`formats.py`). Raises ValueError where TE cannot run."""

    dtype = torch.bfloat16

    def __init__(self, formats: Mapping[str, str] | None = None) -> None:
        te, recipe = _load()
        self._te, self._recipe = te, recipe
        self.formats = possible_formats(formats or {})
        self._high = CastPrecision(self.dtype)
        self._modules: dict[nn.Parameter, nn.Module] = {}
        self._fresh: set[nn.Parameter] = set()

    @property
    def wire(self) -> Backend | None:
        return ReferenceBackend() if self.formats["dispatch"] == "fp8_pow2" else None

    def of(self, module: str) -> Products:
        return TransformerEngineProducts(self) if self.formats[module] in LINEAR_FORMATS else self._high

    def refresh(self) -> None:
        """The weights have changed: their copies and FP8 forms are made again at the next use."""
        self._fresh.clear()
        self._high.refresh()

    def forget(self, weight: nn.Parameter) -> None:
        self._modules.pop(weight, None)
        self._fresh.discard(weight)
        self._high.forget(weight)

    def autocast(self) -> AbstractContextManager[Any]:
        return self._te.autocast(enabled=True, recipe=self._recipe)

    def module(self, weight: nn.Parameter) -> nn.Module:
        """The TE module of a weight [N, K], or [E, N, K] of experts, with the weight as it is now."""
        if weight not in self._modules:
            self._modules[weight] = self._make(weight)
        module = self._modules[weight]
        if weight not in self._fresh:
            with torch.no_grad():
                for copy, master in zip(_weights(module), _matrices(weight), strict=True):
                    copy.copy_(master)
            zeros = torch.zeros(ALIGN, weight.shape[-1], dtype=self.dtype, device=weight.device, requires_grad=True)
            splits = _splits(weight, [ALIGN])
            with torch.enable_grad(), self.autocast():
                module(zeros, *splits, is_first_microbatch=True)  # quantises, for Fprop and for Dgrad
            self._fresh.add(weight)
        return module

    def _make(self, weight: nn.Parameter) -> nn.Module:
        N, K = weight.shape[-2:]
        if N % ALIGN or K % ALIGN:
            raise ValueError(
                f"Transformer Engine multiplies sizes that are multiples of {ALIGN}; a weight is {N} × {K}. Use "
                "precision.backend=triton or reference, or bf16 for that module (precision.formats)"
            )
        options: dict[str, Any] = {
            "bias": False,
            "params_dtype": self.dtype,
            "device": weight.device,
            "delay_wgrad_compute": True,
            "fuse_wgrad_accumulation": True,
            "init_method": _leave,
        }
        if weight.ndim == 2:
            return self._te.Linear(K, N, **options)
        return self._te.GroupedLinear(len(weight), K, N, **options)


@dataclass(frozen=True)
class TransformerEngineProducts(Products):
    """The products of a module whose format is an FP8 one."""

    precision: TransformerEnginePrecision

    def linear(self, x_TI: Tensor, weight_OI: nn.Parameter, queue: WeightGrads) -> Tensor:
        rows = x_TI.flatten(0, -2)
        return self._run(rows, weight_OI, [len(rows)], queue).view(*x_TI.shape[:-1], len(weight_OI))

    def grouped_linear(self, x_RI: Tensor, weight_EOI: nn.Parameter, counts: list[int], queue: WeightGrads) -> Tensor:
        return self._run(x_RI, weight_EOI, counts, queue)

    def copied(self, shape: torch.Size, stored: torch.dtype) -> int:
        return copied(shape)

    def _run(self, x_RI: Tensor, weight: nn.Parameter, counts: Sequence[int], queue: WeightGrads) -> Tensor:
        module = self.precision.module(weight)

        def before_backward() -> None:
            for copy, grad in zip(_weights(module), _matrices(grad_of(weight)), strict=True):
                copy.main_grad = grad  # type: ignore[attr-defined]

        def after_backward() -> None:
            queue.put(module.backward_dw)  # type: ignore[arg-type]

        x_RI = _Call.apply(x_RI, weight, after_backward)
        padded_PI, sizes, rows = pad_rows(x_RI, counts)
        with self.precision.autocast():
            y_PO = module(padded_PI, *_splits(weight, sizes), is_first_microbatch=False)
        y_RO = y_PO if rows is None else y_PO.index_select(0, rows)
        return _Call.apply(y_RO, weight, before_backward)


class TransformerEngineOnPaper(Fp8Precision):
    """For plans where TE cannot run: what it keeps and sends, counted with the reference backend in its place."""

    def __init__(self, formats: Mapping[str, str] | None = None) -> None:
        super().__init__(ReferenceBackend(), possible_formats(formats or {}))

    def of(self, module: str) -> Products:
        format = LINEAR_FORMATS.get(self.formats[module])
        return super().of(module) if format is None else _ProductsOnPaper(self, format)


class _ProductsOnPaper(Fp8Products):
    def copied(self, shape: torch.Size, stored: torch.dtype) -> int:
        return copied(shape)


def copied(shape: torch.Size) -> int:
    """Bytes of what TE keeps beside a weight: its BF16 copy, and in E4M3 with scales the weight and its transpose."""
    *experts, N, K = shape
    rows, columns = -(-N // TILE), -(-K // TILE)
    scales = rows * (-(-columns // 4) * 4) + columns * (-(-rows // 4) * 4)  # TE fills up its rows to multiples of 4
    return math.prod(experts) * (4 * N * K + 4 * scales)


def possible_formats(formats: Mapping[str, str]) -> dict[str, str]:
    """The table with what TE has instead. Raises ValueError as `complete` does."""
    return {
        module: "bf16" if module == "swiglu" else "fp8_pow2" if name in LINEAR_FORMATS else name
        for module, name in complete(formats).items()
    }


def pad_rows(x_RK: Tensor, counts: Sequence[int]) -> tuple[Tensor, list[int], Tensor | None]:
    """Every expert's rows filled up with zeros to a multiple of 16, and to 16 in all if there is no row.

    Returns the rows [P, K], their numbers by expert, and where the given ones are among them (None: just there).
    """
    sizes = [-(-count // ALIGN) * ALIGN for count in counts]
    if not sum(sizes):
        sizes[0] = ALIGN
    if sizes == list(counts):
        return x_RK, sizes, None
    starts = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
    rows = torch.cat([torch.arange(count) + start for count, start in zip(counts, starts, strict=True)])
    rows = rows.to(x_RK.device, non_blocking=True)
    return x_RK.new_zeros(sum(sizes), x_RK.shape[1]).index_copy(0, rows, x_RK), sizes, rows


class _Call(torch.autograd.Function):
    """Nothing in forward; in backward a call, before the gradient goes on. A gradient is asked for in any case."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        ctx.call()
        return dy, None, None


def _splits(weight: nn.Parameter, sizes: Sequence[int]) -> list[list[int]]:
    """What GroupedLinear wants after its input: rows by expert. A list works in every version; others want none."""
    return [] if weight.ndim == 2 else [[*sizes, *[0] * (len(weight) - len(sizes))]]


def _matrices(tensor: Tensor) -> list[Tensor]:
    return [tensor] if tensor.ndim == 2 else list(tensor.unbind())


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """TE's own parameters: `weight`, or `weight0`, `weight1`, … of the experts."""
    return list(module.parameters())


def _leave(weight: Tensor) -> None:
    """Initialises nothing: TE's default would draw random numbers."""


def _load() -> tuple[ModuleType, Any]:
    """transformer_engine.pytorch, and its recipe of tiles and blocks."""
    advice = "or use precision.backend=triton or reference"
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import Float8BlockScaling
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            "precision.backend=transformer_engine needs NVIDIA's Transformer Engine, and that an NVIDIA GPU: "
            f"pip install --no-build-isolation -e '.[gpu]' ({error}); {advice}"
        ) from error
    found = version("transformer_engine")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise ValueError(f"Transformer Engine {found} is too old: {OLDEST[0]}.{OLDEST[1]} or later is needed; {advice}")
    available, reason = te.is_fp8_block_scaling_available(return_reason=True)
    if not available:
        raise ValueError(f"Transformer Engine cannot compute in FP8 tiles here: {reason}; {advice}")
    return te, Float8BlockScaling()
