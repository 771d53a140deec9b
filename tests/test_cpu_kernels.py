"""Our C++ kernels (`compile=on`) give what torch's operators give, for any shape, packed documents and both dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import AttentionContext, HeadSizes, _FromHeads
from model.cpu import kernels as library

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # beside FP64; twice what rounding once, or inside, explains
needs_avx512 = pytest.mark.skipif(not library.suits(torch.empty(0)), reason="the kernels need AVX-512 and oneDNN")


def distance(ours: Tensor, exact: Tensor) -> float:
    ours, exact = ours.detach(), exact.detach()
    return float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-9))


def attention_and_gradients(dtype: torch.dtype, sizes: HeadSizes, documents_BS: Tensor, seed: int) -> list[Tensor]:
    """Output and gradients in `dtype`; the operands are BF16's, so that every dtype starts from the same."""
    generator = torch.Generator().manual_seed(seed)
    B, S = documents_BS.shape
    H, N, R, V = sizes.H, sizes.N, sizes.R, sizes.V

    def draw(width: int) -> Tensor:
        return torch.randn(B, S, width, generator=generator).bfloat16().to(dtype).requires_grad_()

    heads = [draw(H * (N + R)), draw(H * (N + V)), draw(R)]
    angles = torch.randn(B, S, R // 2, generator=generator).to(torch.promote_types(dtype, torch.float32))
    context = AttentionContext(documents_BS, angles.cos(), angles.sin())
    out = _FromHeads.apply(*heads, sizes, context)
    return [out, *torch.autograd.grad(out, heads, draw(H * V).detach())]


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_attention_equals_the_one_in_blocks(dtype: torch.dtype, data: st.DataObject) -> None:
    B, S, H = (data.draw(st.integers(1, most)) for most in (3, 300, 3))
    N, R, V = data.draw(st.integers(1, 40)), 2 * data.draw(st.integers(1, 10)), data.draw(st.integers(1, 40))
    borders = torch.tensor(data.draw(st.lists(st.integers(0, S), min_size=B, max_size=5 * B)))
    documents_BS = torch.zeros(B, S + 1, dtype=torch.int64)
    documents_BS[torch.arange(len(borders)) % B, borders] = 1
    documents_BS = documents_BS.cumsum(1)[:, :S]
    seed = data.draw(st.integers(0, 99))
    ours = attention_and_gradients(dtype, HeadSizes(H, N, R, V, 0.2, compiled=True), documents_BS, seed)
    exact = attention_and_gradients(torch.float64, HeadSizes(H, N, R, V, 0.2), documents_BS, seed)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype == dtype
        assert distance(mine, theirs) <= TOLERANCE[dtype]
