"""Our use of Transformer Engine, on its own classes: see transformer_engine_standin.py.

Run by test_transformer_engine.py in a process of its own, since the stand-in changes the process for good.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dualpipe.wgrad import WeightGradQueue
from model.fp8 import transformer_engine
from model.fp8.reference import ReferenceBackend
from model.functional import make_kernels
from model.precision import CastPrecision
from model.precisions import PrecisionConfig, make_precision
from model.protocols import AtOnce
from tests.transformer_engine_standin import import_transformer_engine

te = import_transformer_engine()
COUNTS = ([3, 0, 30], [16, 32, 0], [0, 0, 0])


def make() -> transformer_engine.TransformerEnginePrecision:
    precision, parameters = make_precision(PrecisionConfig("fp8", backend="transformer_engine"))
    assert isinstance(precision, transformer_engine.TransformerEnginePrecision) and parameters == torch.float32
    return precision


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(precision, weight: nn.Parameter, queue, counts: list[int] | None, rows: int, seed: int) -> tuple[Tensor, ...]:
    """Forward and backward of one micro-batch: y and dx."""
    x = random(seed, rows, weight.shape[-1]).bfloat16().requires_grad_()
    products = precision.of("mlp_down")
    y = products.linear(x, weight, queue) if counts is None else products.grouped_linear(x, weight, counts, queue)
    y.backward(random(seed + 1, *y.shape).bfloat16())
    return y.detach(), x.grad


def close(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("counts", [None, *COUNTS])
@pytest.mark.parametrize("deferred", [False, True])
def test_products_and_gradients_over_micro_batches_and_steps(counts: list[int] | None, deferred: bool) -> None:
    shape = (48, 32) if counts is None else (3, 48, 32)
    rows = 21 if counts is None else sum(counts)
    ours, plain = make(), CastPrecision(torch.bfloat16)
    w, v = (nn.Parameter(random(0, *shape)) for _ in range(2))
    queue = WeightGradQueue()
    for step in range(2):
        for micro_batch in range(3):
            seed = 10 * step + 2 * micro_batch
            expected = run(plain, v, AtOnce(), counts, rows, seed)
            if deferred:
                with queue.record(micro_batch):
                    found = run(ours, w, queue, counts, rows, seed)
            else:
                found = run(ours, w, AtOnce(), counts, rows, seed)
            assert all(close(a, b) for a, b in zip(found, expected, strict=True))
        if deferred:
            assert w.grad is None or not w.grad.any()
            assert len(queue) == 3
            for micro_batch in (1, 0, 2):  # in whatever order: each runs one that waits
                queue.run(micro_batch)
        assert w.grad is not None and w.grad.dtype == torch.float32
        assert close(w.grad, v.grad)
        assert counts is None or not w.grad[[c == 0 for c in counts]].any()
        with torch.no_grad():
            for p, precision in ((w, ours), (v, plain)):
                p.add_(random(99 + step, *shape))
                p.grad = None
                precision.refresh()


def test_the_weight_is_quantised_once_per_step() -> None:
    ours, w = make(), nn.Parameter(random(0, 48, 32))
    run(ours, w, AtOnce(), None, 16, 0)
    module = ours.module(w)
    quantised = module.quantised
    run(ours, w, AtOnce(), None, 16, 2)
    assert ours.module(w) is module and module.quantised is quantised
    ours.refresh()
    run(ours, w, AtOnce(), None, 16, 4)
    assert ours.module(w) is module and module.quantised is not quantised


def test_evaluation_leaves_no_gradient_and_an_input_without_one_is_no_obstacle() -> None:
    ours, w = make(), nn.Parameter(random(0, 48, 32))
    x = random(1, 2, 5, 32).bfloat16()
    with torch.no_grad():
        y = ours.of("mlp_down").linear(x, w, AtOnce())
    assert y.shape == (2, 5, 48) and w.grad is None
    ours.of("mlp_down").linear(x, w, AtOnce()).sum().backward()
    assert close(w.grad, torch.ones(10, 48).t() @ x.flatten(0, 1).float())


def test_swiglu_and_formats() -> None:
    ours, plain = make(), CastPrecision(torch.bfloat16)
    w = nn.Parameter(random(0, 48, 32))
    gate_up, gates, kernels = random(1, 7, 64).bfloat16(), random(2, 7), make_kernels(False)
    found, expected = (
        p.of("mlp_down").swiglu_linear(gate_up, gates, w, None, kernels, AtOnce()) for p in (ours, plain)
    )
    assert close(found, expected)
    assert isinstance(ours.of("router"), CastPrecision) and isinstance(ours.wire, ReferenceBackend)
    assert ours.formats["attention_output"] == ours.formats["experts_down"] == "fp8_pow2"
    assert (ours.formats["swiglu"], ours.formats["head"]) == ("bf16", "bf16")
    assert transformer_engine.TransformerEnginePrecision({"dispatch": "bf16"}).wire is None


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"multiples of 16; a weight is 40 × 32"):
        make().of("mlp_down").linear(torch.ones(3, 32).bfloat16(), nn.Parameter(torch.ones(40, 32)), AtOnce())
    with pytest.raises(ValueError, match=r"gradient_blocks=true needs precision\.backend=reference"):
        make_precision(PrecisionConfig("fp8", backend="transformer_engine", gradient_blocks=True))
    monkeypatch.setattr(transformer_engine, "version", lambda name: "2.8.0")
    with pytest.raises(ValueError, match=r"2\.8\.0 is too old: 2\.9 or later"):
        make()


def test_an_older_gpu_is_refused_by_the_library_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te, "is_fp8_block_scaling_available", lambda return_reason: (False, "needs Hopper"))
    with pytest.raises(ValueError, match="cannot compute in FP8 tiles here: needs Hopper"):
        make()
