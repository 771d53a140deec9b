"""FP8 numbers, tiles, blocks and products against plain loops and FP64; linear layers built on them; the table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

from dualpipe.wgrad import WeightGradQueue
from model.fp8.backends import BACKENDS, make_backend
from model.fp8.e5m6 import pack, unpack
from model.fp8.formats import TABLE, complete, describe_formats
from model.fp8.precision import Fp8Precision
from model.fp8.quantize import (
    E4M3,
    TILE,
    Quantized,
    pad_groups,
    quantize_blocks,
    quantize_tensor,
    quantize_tiles,
    quantize_transposed,
)
from model.fp8.reference import ReferenceBackend
from model.functional import make_kernels
from model.precision import CastPrecision, Products
from model.precisions import PrecisionConfig, make_precision
from model.protocols import AtOnce

SIZES = st.sampled_from([1, 2, 5, 127, 128, 129, 200, 256, 300])
EVERY_E4M3 = torch.arange(256, dtype=torch.uint8).view(E4M3)


def plainly(x: Tensor, power_of_two: bool) -> Tensor:
    """One group, quantised and back, element by element: the nearest of all E4M3 numbers, ties to even."""
    largest = x.abs().max()
    if not largest < math.inf:
        return torch.full_like(x, math.nan)
    scale = largest / 448
    scale = scale if scale > 0 else torch.ones(())
    if power_of_two:
        mantissa, exponent = math.frexp(float(scale))
        scale = torch.tensor(2.0 ** (exponent - 1 if mantissa == 0.5 else exponent))
    known = EVERY_E4M3.float()
    known, even = known[~known.isnan()], (torch.arange(256) % 2 == 0)[~known.isnan()]
    distance = (known.double() - (x / scale).double().unsqueeze(-1)).abs()
    distance = distance + torch.where(even, 0.0, 1e-12)
    return known[distance.argmin(-1)] * scale


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def heavy(rows: int, width: int, seed: int = 0) -> Tensor:
    """Values over many orders of magnitude, with outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    x[:, :: max(1, width // 3)] *= 100
    return x


@given(SIZES, SIZES, st.booleans(), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_tiles_are_what_a_plain_loop_makes_of_them(M: int, K: int, power_of_two: bool, seed: int) -> None:
    x = heavy(min(M, 5), K, seed)
    wanted = torch.cat([torch.stack([plainly(row, power_of_two) for row in part]) for part in x.split(TILE, 1)], 1)
    assert torch.equal(quantize_tiles(x, power_of_two).dequantize(), wanted)


@given(SIZES, SIZES, st.booleans(), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_blocks_are_what_a_plain_loop_makes_of_them(N: int, K: int, power_of_two: bool, seed: int) -> None:
    w = heavy(N, K, seed)
    wanted = torch.cat(
        [torch.cat([plainly(b, power_of_two) for b in rows.split(TILE, 1)], 1) for rows in w.split(TILE, 0)]
    )
    blocks = quantize_blocks(w, power_of_two)
    assert torch.equal(blocks.dequantize(), wanted)
    assert torch.equal(blocks.transposed().dequantize(), wanted.t())
    stacked = quantize_blocks(torch.stack((w, 3 * w)), power_of_two)
    assert torch.equal(stacked.dequantize()[0], wanted)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=4), st.booleans())
@settings(max_examples=20, deadline=None)
def test_transposed_tiles_never_mix_two_experts(counts: list[int], power_of_two: bool) -> None:
    x = heavy(sum(counts), 7)
    found = quantize_transposed(x, counts, power_of_two)
    assert found.shape == (7, len(pad_groups(x, counts)))
    at = 0
    for rows in x.split(counts):
        padded = -(-len(rows) // TILE) * TILE
        ours = found.dequantize()[:, at : at + padded]
        if len(rows):
            assert torch.equal(ours[:, : len(rows)], quantize_tiles(rows.t(), power_of_two).dequantize())
        assert not ours[:, len(rows) :].any()
        at += padded


def test_scales_are_powers_of_two_and_quantising_again_changes_nothing() -> None:
    x = heavy(50, 300)
    x[7, 0] = 448.0 * 2.0**-3  # the largest value of its tile, and exactly at the border between two scales
    x[7, 1:128] = 0.25
    tiles = quantize_tiles(x, power_of_two=True)
    assert torch.equal(tiles.scales.log2(), tiles.scales.log2().round())
    exact = quantize_tiles(x).scales
    assert ((tiles.scales >= exact) & (tiles.scales < 2 * exact)).all()
    assert torch.equal(quantize_tiles(tiles.dequantize(), True).dequantize(), tiles.dequantize())
    assert torch.equal(tiles.dequantize(torch.bfloat16).float(), tiles.dequantize())  # exact in BF16 as well


def test_zeros_equal_values_and_underflow() -> None:
    tiny = torch.full((1, TILE), 1e-45)
    for x in (torch.zeros(3, 200), torch.full((3, 200), -0.3), tiny):
        for quantize in (quantize_tiles, quantize_blocks, lambda t: quantize_transposed(t)):
            found = quantize(x)
            assert found.dequantize().isfinite().all() and found.scales.gt(0).all()
    assert relative(quantize_tiles(torch.full((3, 200), -0.3)).dequantize(), torch.full((3, 200), -0.3)) < 1e-6


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_makes_its_group_nan_and_no_other(bad: float, power_of_two: bool) -> None:
    x = torch.randn(300, 300)
    x[130, 5] = bad
    tile, block = torch.zeros(300, 300, dtype=torch.bool), torch.zeros(300, 300, dtype=torch.bool)
    tile[130, :128], block[128:256, :128] = True, True
    assert torch.equal(quantize_tiles(x, power_of_two).dequantize().isnan(), tile)
    assert torch.equal(quantize_blocks(x, power_of_two).dequantize().isnan(), block)
    column = torch.zeros(300, 384, dtype=torch.bool)
    column[5, 128:256] = True
    assert torch.equal(quantize_transposed(x, power_of_two=power_of_two).dequantize().isnan(), column)
    y = ReferenceBackend().gemm(quantize_tiles(x, power_of_two), quantize_blocks(torch.randn(9, 300)))
    assert y[130].isnan().all() and y[:130].isfinite().all() and y[131:].isfinite().all()


def test_scales_of_another_shape_are_refused() -> None:
    values = torch.zeros(3, 200).to(E4M3)
    with pytest.raises(ValueError, match=r"scales of shape \(3, 1\).*expected \(3, 2\)"):
        Quantized(values, torch.ones(3, 1))
    with pytest.raises(ValueError, match="1 × 128 have no transpose"):
        Quantized(values, torch.ones(3, 2)).transposed()


def test_e5m6_keeps_six_bits_of_mantissa() -> None:
    for width in (1, 129, 300):
        x = heavy(40, width).bfloat16().float()
        tiles = quantize_tiles(x, power_of_two=True)
        upper, lower, scales = pack(x, tiles)
        assert upper.nbytes + lower.nbytes == 40 * width + 40 * -(-width // 2)
        found = unpack(upper, lower, scales)
        smallest = tiles.row_scales.repeat_interleave(TILE, 1)[:, :width] * 2.0**-14  # below, steps are equal
        assert ((found - x).abs() <= torch.maximum(x.abs(), smallest) * 2.0**-7).all()


# -- products ----------------------------------------------------------------------------------------------------------


@given(SIZES, SIZES, SIZES)
@settings(max_examples=30, deadline=None)
def test_a_product_is_that_of_the_dequantised_operands(M: int, N: int, K: int) -> None:
    a, b = quantize_tiles(heavy(M, K)), quantize_blocks(heavy(N, K, 1))
    wanted = a.dequantize().double() @ b.dequantize().double().t()
    size = a.dequantize().double().abs() @ b.dequantize().double().abs().t()
    found = ReferenceBackend().gemm(a, b, torch.float32)
    assert ((found - wanted).abs() <= 1e-5 * size).all()  # FP32 sums of 128


@given(st.lists(st.sampled_from([0, 0, 1, 31, 128, 200]), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_grouped_products_are_those_of_each_expert(counts: list[int]) -> None:
    backend, (E, N, K) = ReferenceBackend(), (len(counts), 70, 140)
    x, dy = heavy(sum(counts), K), heavy(sum(counts), N, 1)
    w = quantize_blocks(torch.stack([heavy(N, K, e) for e in range(E)]))
    y = backend.grouped_gemm(quantize_tiles(x), w, counts, torch.float32)
    dx = backend.grouped_gemm(quantize_tiles(dy), w.transposed(), counts, torch.float32)
    grad = torch.ones(E, N, K)
    backend.add_grouped_wgrad(grad, quantize_transposed(dy, counts), quantize_transposed(x, counts), counts)
    for e, (xs, dys) in enumerate(zip(x.split(counts), dy.split(counts), strict=True)):
        rows = slice(sum(counts[:e]), sum(counts[: e + 1]))
        one = Quantized(w.values[e], w.scales[e], TILE)
        alone = torch.ones(N, K)
        if len(xs):
            backend.add_wgrad(alone, quantize_transposed(dys), quantize_transposed(xs))
            assert relative(y[rows], backend.gemm(quantize_tiles(xs), one, torch.float32)) < 1e-5
            assert relative(dx[rows], backend.gemm(quantize_tiles(dys), one.transposed(), torch.float32)) < 1e-5
        assert relative(grad[e], alone) < 1e-5


def test_tiles_keep_what_one_scale_for_the_tensor_loses() -> None:
    """Outlier channels 300,000 times larger than the rest: FP8 with one scale rounds the rest to nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1024, generator=generator)
    x[:, ::256] *= 300_000
    quiet = torch.ones(1024, dtype=torch.bool)
    quiet[::256] = False
    by_tile = relative(quantize_tiles(x).dequantize()[:, 128:256], x[:, 128:256])
    by_tensor = relative(quantize_tensor(x).dequantize()[:, 128:256], x[:, 128:256])
    assert by_tile < 0.04 and by_tensor > 0.3


# -- layers ------------------------------------------------------------------------------------------------------------


def fp8(name: str = "attention_query_up") -> tuple[Fp8Precision, Products]:
    precision = Fp8Precision(ReferenceBackend())
    return precision, precision.of(name)


def gradients(products: Products, counts: list[int] | None, x: Tensor, weight: Tensor, queue: object) -> list[Tensor]:
    leaf, parameter = x.clone().requires_grad_(), nn.Parameter(weight.clone())
    if counts is None:
        y = products.linear(leaf, parameter, queue)  # type: ignore[arg-type]
    else:
        y = products.grouped_linear(leaf, parameter, counts, queue)  # type: ignore[arg-type]
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    if isinstance(queue, WeightGradQueue):
        return [y, leaf, parameter]
    assert leaf.grad is not None and parameter.grad is not None
    return [y.detach(), leaf.grad, parameter.grad]


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """One draw in a hundred of a few numbers nearly cancels, and its relative error is then above any bound."""
    torch.manual_seed(0)


MODULES = ("attention_query_up", "attention_output", "experts_down")


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("rows", "K", "N"), [(300, 140, 70), (5, 7, 3), (128, 128, 128), (0, 16, 16)])
def test_a_linear_layer_is_near_the_exact_one(module: str, rows: int, K: int, N: int) -> None:
    x, w = torch.randn(rows, K).bfloat16(), torch.randn(N, K) * 0.1
    ours = gradients(fp8(module)[1], None, x, w, AtOnce())
    exact = gradients(CastPrecision(torch.float64), None, x.double(), w.double(), AtOnce())
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for found, wanted in zip(ours, exact, strict=True):
        assert found.shape == wanted.shape
        assert not rows or relative(found, wanted) < 0.08  # two roundings to 3 bits, added up at random


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("counts", [[100, 0, 200, 7], [0, 0, 0, 0], [0, 128, 0, 0]])
def test_a_grouped_layer_is_near_the_exact_one(module: str, counts: list[int]) -> None:
    x, w = torch.randn(sum(counts), 60).bfloat16(), torch.randn(4, 50, 60) * 0.1
    ours = gradients(fp8(module)[1], counts, x, w, AtOnce())
    exact = gradients(CastPrecision(torch.float64), counts, x.double(), w.double(), AtOnce())
    for found, wanted in zip(ours, exact, strict=True):
        assert found.shape == wanted.shape
        assert not sum(counts) or relative(found, wanted) < 0.08
    assert not ours[2][[e for e, n in enumerate(counts) if not n]].any(), "an expert without tokens has a gradient"


@pytest.mark.parametrize("counts", [None, [100, 0, 28]])
def test_the_layer_after_a_swiglu_is_near_the_exact_one(counts: list[int] | None) -> None:
    kernels, results = make_kernels(compiled=False), []
    gate_up, w, gates = torch.randn(128, 120), torch.randn(3, 50, 60) * 0.1, torch.rand(128)
    for products, dtype in ((fp8("experts_down")[1], torch.bfloat16), (CastPrecision(torch.float64), torch.float64)):
        leaf = gate_up.to(dtype).requires_grad_()
        gate = gates.clone().to(torch.float32 if dtype is torch.bfloat16 else dtype).requires_grad_()
        high = torch.float32 if dtype is torch.bfloat16 else dtype
        parameter = nn.Parameter((w if counts else w[0]).to(high))
        y = products.swiglu_linear(leaf, gate if counts else None, parameter, counts, kernels, AtOnce())
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype))
        found = [y.detach(), leaf.grad, parameter.grad, *([gate.grad] if counts else [])]
        results.append([t for t in found if t is not None])
    assert len(results[0]) == len(results[1]) == (4 if counts else 3)
    for ours, exact in zip(*results, strict=True):
        assert relative(ours, exact) < 0.08


@pytest.mark.parametrize("module", MODULES)
def test_put_off_weight_gradients_are_the_same_bits(module: str) -> None:
    x, w, queue = torch.randn(50, 40).bfloat16(), torch.randn(30, 40), WeightGradQueue()
    _, dx, dw = gradients(fp8(module)[1], None, x, w, AtOnce())
    with queue.record("chunk"):
        _, leaf, parameter = gradients(fp8(module)[1], None, x, w, queue)
    assert parameter.grad is None and leaf.grad is not None and torch.equal(leaf.grad, dx)
    queue.run("chunk")
    assert parameter.grad is not None and torch.equal(parameter.grad, dw)


def test_nan_reaches_the_gradients() -> None:
    x, w = torch.randn(50, 40).bfloat16(), torch.randn(30, 40)
    x[3, 3] = math.inf
    y, _, dw = gradients(fp8()[1], None, x, w, AtOnce())
    assert y[3].isnan().all() and dw.isnan().any()


class Counting(ReferenceBackend):
    def __init__(self) -> None:
        self.weights: list[Sequence[int]] = []
        self.inputs = 0

    def quantize_weight(self, w_NK: Tensor, power_of_two: bool = False) -> Quantized:
        self.weights.append(w_NK.shape)
        return super().quantize_weight(w_NK, power_of_two)

    def quantize(self, x_TK: Tensor, power_of_two: bool = False) -> Quantized:
        self.inputs += 1
        return super().quantize(x_TK, power_of_two)


def test_a_weight_is_quantised_once_per_step_and_an_input_once_for_two_layers() -> None:
    backend = Counting()
    precision = Fp8Precision(backend)
    down, key = precision.of("attention_query_down"), precision.of("attention_key_value_down")
    first, second = nn.Parameter(torch.randn(20, 16)), nn.Parameter(torch.randn(30, 16))
    for _ in range(3):  # micro-batches
        x = torch.randn(8, 16).bfloat16()
        before = backend.inputs
        down.linear(x, first, AtOnce())
        key.linear(x, second, AtOnce())
        assert backend.inputs == before + 1
        with torch.no_grad():
            x += 1
        down.linear(x, first, AtOnce())
        assert backend.inputs == before + 2, "a changed input is another one"
    assert [tuple(shape) for shape in backend.weights] == [(20, 16), (30, 16)]
    precision.refresh()
    down.linear(x, first, AtOnce())
    assert len(backend.weights) == 3


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_in_conf_is_the_one_in_the_code() -> None:
    written = OmegaConf.load("conf/precision/fp8.yaml").formats
    assert dict(written) == {module: entry.format for module, entry in TABLE.items()} == complete({})
    text = describe_formats(complete({"head": "fp8"}))
    assert all(module in text for module in TABLE) and "head                      fp8" in text


def test_the_table_decides_and_refuses_what_it_does_not_know() -> None:
    assert isinstance(Fp8Precision(ReferenceBackend()).of("head"), CastPrecision)
    assert not isinstance(Fp8Precision(ReferenceBackend(), {"head": "fp8"}).of("head"), CastPrecision)
    assert Fp8Precision(ReferenceBackend(), {"dispatch": "bf16"}).wire is None
    for config, words in (
        (PrecisionConfig("fp8", formats={"router": "fp8"}), "precision.formats.router=fp8 must be fp32"),
        (PrecisionConfig("fp8", formats={"rooter": "fp8"}), "precision.formats.rooter=fp8: unknown module"),
        (PrecisionConfig("fp8", backend="abacus"), "precision.backend='abacus' is unknown"),
        (PrecisionConfig("fp8", "triton", gradient_blocks=True), "precision.backend=reference, not triton"),
        (PrecisionConfig("bf16", gradient_blocks=True), "precision.gradient_blocks=True is for precision=fp8"),
    ):
        with pytest.raises(ValueError, match=words):
            make_precision(config)
    assert make_backend("reference").name == "reference" and "reference" in BACKENDS
