"""Transformer Engine without a GPU: its own Python classes, with the arithmetic of their forward replaced.

The wheel has all the Python files. What it lacks here is the compiled extension, of which only two enumerations are
read at import; and a GPU, of which only a few properties are. So modules are really constructed, `autocast` is really
entered and `backward_dw` really pops TE's queue. A forward first binds its arguments to TE's signature and lets TE
check the sizes; then it multiplies in plain PyTorch, and follows TE in what its backward does with the gradient.

Import this before anything imports transformer_engine. It changes the process for good: use it in one of its own.
"""

from __future__ import annotations

import ast
import enum
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor


class _Extension(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=name)


def _enumeration(path: str, name: str, prefix: str = "") -> Any:
    """The compiled twin of one of TE's Python enumerations. Older versions have none and compare nothing."""
    package = Path(importlib.util.find_spec("transformer_engine").origin).parent
    for node in ast.parse((package / "pytorch" / path).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            members = [n.targets[0].id for n in node.body if isinstance(n, ast.Assign)]
            return enum.IntEnum(name, {prefix + member: i for i, member in enumerate(members)})
    return mock.MagicMock(name=name)


def import_transformer_engine() -> ModuleType:
    """transformer_engine.pytorch, as it is on a machine with a Hopper GPU and CUDA 13, but for the compiled parts."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    extension = _Extension("transformer_engine_torch")
    extension.DType = _enumeration("constants.py", "DType")
    extension.NVTE_Fused_Attn_Backend = _enumeration("cpp_extensions/fused_attn.py", "FusedAttnBackend", "NVTE_")
    sys.modules[extension.__name__] = extension
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda name: None
    import transformer_engine.pytorch as te

    card = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="H100")
    torch.version.cuda = "13.0"
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *name: None
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    torch.cuda.get_device_properties = lambda *device: card
    _replace_forward(te.Linear)
    _replace_forward(te.GroupedLinear)
    return te


def _replace_forward(cls: type) -> None:
    signature = inspect.signature(cls.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        x, first = given.arguments["inp"], given.arguments["is_first_microbatch"]
        splits = given.arguments.get("m_splits", [x.shape[0]])
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager
        from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec

        assert FP8GlobalStateManager.is_fp8_enabled(), "outside of autocast"
        assert FP8GlobalStateManager.get_fp8_recipe().float8_block_scaling()
        weights = list(self.parameters())
        assert len(splits) == len(weights) and all(type(split) is int for split in splits)
        assert sum(splits) == len(x)
        for rows in x.split(splits):
            assert_dim_for_fp8_exec(rows, *weights)
            assert len(rows) % 16 == 0  # Wgrad sums over them
        if first is None or first:
            self.quantised = [weight.detach().clone() for weight in weights]
        return _Product.apply(x, self, splits, first, *weights)

    cls.forward = forward


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, splits: list[int], first: bool | None, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.splits, ctx.first, ctx.weights = module, splits, first, weights
        rows = zip(x.split(splits), module.quantised, strict=True)
        return torch.cat([part @ weight.t() for part, weight in rows])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), module = ctx.saved_tensors, ctx.module
        main_grads = [weight.main_grad for weight in ctx.weights]  # as they are when backward begins
        assert all(grad.dtype == torch.float32 and grad.is_contiguous() for grad in main_grads)

        @torch.no_grad()
        def wgrad(x: Tensor, dy: Tensor, grads: list[Tensor]) -> tuple[Any, ...]:
            for grad, x_rows, dy_rows in zip(grads, x.split(ctx.splits), dy.split(ctx.splits), strict=True):
                if ctx.first:
                    grad.zero_()
                grad.add_(dy_rows.t() @ x_rows)
            return (None, None) if len(grads) == 1 and not hasattr(module, "num_gemms") else (None, [None], None)

        module.wgrad_store.put([x, dy, main_grads], wgrad)
        rows = zip(dy.split(ctx.splits), module.quantised, strict=True)
        return torch.cat([part @ weight for part, weight in rows]), *[None] * (3 + len(ctx.weights))
