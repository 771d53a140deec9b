"""The torch backend without a GPU: its calls are checked by torch's own rules for a CUDA device, and carried out here
by reading operands and scales in the layout that cuBLASLt documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import ScalingType

from model.fp8.backends import make_backend
from model.fp8.quantize import TILE, Quantized, quantize_blocks, quantize_tiles, quantize_transposed
from model.fp8.reference import ReferenceBackend
from model.fp8.torch_backend import TorchBackend

real_scaled_mm = F.scaled_mm


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, recipe_a: Any, scale_b: Tensor, recipe_b: Any, *, output_dtype: torch.dtype
) -> Tensor:
    """What cuBLASLt computes; and torch's opinion of the call, were the tensors on a GPU."""
    with FakeTensorMode():

        def fake(x: Tensor) -> Tensor:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

        shapes = [fake(x) for x in (a, b, scale_a, scale_b)]
        wanted = real_scaled_mm(
            shapes[0], shapes[1], shapes[2], recipe_a, shapes[3], recipe_b, output_dtype=output_dtype
        )
    assert len(a) % 16 == 0 and a.stride(1) == b.stride(0) == 1
    assert recipe_a == ScalingType.BlockWise1x128
    left = Quantized(a, scale_a).dequantize()
    if recipe_b == ScalingType.BlockWise128x128:
        right = Quantized(b.t(), scale_b.t()[:, : a.shape[1] // TILE], TILE)
    else:
        right = Quantized(b.t(), scale_b)
    out = (left.double() @ right.dequantize().double().t()).to(output_dtype)
    assert out.shape == wanted.shape and out.dtype == wanted.dtype
    return out


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> TorchBackend:
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return TorchBackend()


def same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("M", "N", "K"), [(128, 256, 512), (1, 1, 1), (130, 70, 129), (0, 16, 128), (64, 384, 640)])
def test_products_are_those_of_the_reference(backend: TorchBackend, M: int, N: int, K: int) -> None:
    x, w, dy = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
    plain, blocks = ReferenceBackend(), quantize_blocks(w)
    f32 = torch.float32
    assert same(backend.gemm(quantize_tiles(x), blocks, f32), plain.gemm(quantize_tiles(x), blocks, f32))
    back = blocks.transposed()
    assert same(backend.gemm(quantize_tiles(dy), back, f32), plain.gemm(quantize_tiles(dy), back, f32))
    if M:
        ours, theirs = torch.ones(N, K), torch.ones(N, K)
        backend.add_wgrad(ours, quantize_transposed(dy), quantize_transposed(x))
        plain.add_wgrad(theirs, quantize_transposed(dy), quantize_transposed(x))
        assert same(ours, theirs)
    assert backend.gemm(quantize_tiles(x), blocks).dtype == torch.bfloat16


@pytest.mark.parametrize("counts", [[5, 0, 130], [0, 0, 0], [128, 256, 1]])
def test_grouped_products_are_those_of_the_reference(backend: TorchBackend, counts: list[int]) -> None:
    N, K, R, f32 = 72, 140, sum(counts), torch.float32
    x, dy, w = torch.randn(R, K), torch.randn(R, N), quantize_blocks(torch.randn(3, N, K))
    plain = ReferenceBackend()
    for a, b in ((quantize_tiles(x), w), (quantize_tiles(dy), w.transposed())):
        assert same(backend.grouped_gemm(a, b, counts, f32), plain.grouped_gemm(a, b, counts, f32))
    ours, theirs = torch.ones(3, N, K), torch.ones(3, N, K)
    for one, grad in ((backend, ours), (plain, theirs)):
        one.add_grouped_wgrad(grad, quantize_transposed(dy, counts), quantize_transposed(x, counts), counts)
    assert same(ours, theirs)


def test_without_a_hopper_it_says_so() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"precision.backend=torch needs a Hopper GPU .* found no NVIDIA GPU"):
            make_backend("torch")
