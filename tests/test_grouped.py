"""The two ways to multiply by all experts, a loop and torch's grouped GEMM, give the same for any loads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.products import (
    add_grouped_weight_grads,
    add_weight_grads_by_kernel,
    grouped_kernel,
    grouped_product,
    has_grouped_kernel,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-30))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@given(counts=st.lists(st.one_of(st.just(0), st.integers(1, 70)), min_size=1, max_size=6), transposed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_grouped_gemm_equals_the_loop(
    dtype: torch.dtype, tolerance: float, counts: list[int], transposed: bool
) -> None:
    """Experts without rows, no rows at all, and weights handed over as a transposed view, as in the backward."""
    rows, experts = sum(counts), len(counts)
    x, dy = random(rows, 32).to(dtype), random(rows, 48, seed=1).to(dtype)
    weight = random(experts, 48, 32, seed=2).to(dtype)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert apart(grouped_kernel(x, weight, counts), grouped_product(x, weight, counts)) <= tolerance
    by_loop = random(experts, 48, 32, seed=3)
    by_kernel = by_loop.clone()
    add_grouped_weight_grads(by_loop, dy, x, counts)
    add_weight_grads_by_kernel(by_kernel, dy, x, counts)
    assert apart(by_kernel, by_loop) <= tolerance
    idle = [expert for expert, count in enumerate(counts) if not count]
    assert torch.equal(by_kernel[idle], by_loop[idle])


def test_a_cpu_takes_the_loop() -> None:
    assert not has_grouped_kernel(random(4, 32).bfloat16(), random(2, 48, 32).bfloat16())
