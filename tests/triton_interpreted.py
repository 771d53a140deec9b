"""Every Triton kernel in Triton's interpreter on CPU tensors, against the reference backend.

Run by test_triton.py in a process of its own, since Triton decides at its import whether to interpret:

    TRITON_INTERPRET=1 python -m pytest tests/triton_interpreted.py
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualpipe.wgrad import WeightGradQueue
from model.fp8.backends import make_backend
from model.fp8.precision import Fp8Precision
from model.fp8.quantize import Quantized
from model.fp8.triton_e4m3 import INTERPRETED
from model.functional import make_kernels

if not INTERPRETED:
    pytest.skip("Triton does not interpret: set TRITON_INTERPRET=1", allow_module_level=True)

OURS, REFERENCE = make_backend("triton"), make_backend("reference")
SPECIAL = (0.0, -0.0, 1e-45, -1e-41, 1e-38, 448.0, 3e38, float("inf"), float("-inf"), float("nan"))

# Without shrinking: the interpreter is slow, and the sizes are small enough to read.
few = settings(max_examples=12, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
sizes = st.one_of(st.integers(1, 20), st.integers(1, 300), st.sampled_from([127, 128, 129, 256]))
seeds = st.integers(0, 2**31)
counts_of = st.lists(st.one_of(st.just(0), st.integers(1, 5), st.integers(100, 150)), min_size=1, max_size=4)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Heavy-tailed, with a tile of zeros and a tile of equal values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(shape, generator=generator))
    if x.numel():
        x[..., 0, :128] = 0
        x[..., -1, :128] = -3.7
    return x.to(dtype)


def with_special_values(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    where = torch.randint(x.numel(), (5,), generator=generator)
    what = torch.randint(len(SPECIAL), (5,), generator=generator)
    return x.flatten().index_put((where,), torch.tensor(SPECIAL)[what].to(x.dtype)).view(x.shape)


def assert_equal(ours: Quantized, reference: Quantized) -> None:
    """The same scales and the same bytes; a NaN is a NaN, whatever its sign."""
    assert ours.group_rows == reference.group_rows
    assert ours.scales.is_contiguous() and ours.values.is_contiguous()
    scales, expected = ours.scales, reference.scales
    assert torch.equal(scales.isnan(), expected.isnan())
    assert torch.equal(scales.nan_to_num(1.0), expected.nan_to_num(1.0))
    values, expected = ours.values, reference.values
    nan = expected.float().isnan()
    assert torch.equal(values.float().isnan(), nan)
    assert torch.equal(values.view(torch.uint8)[~nan], expected.contiguous().view(torch.uint8)[~nan])
    assert torch.equal(ours.dequantize().nan_to_num(7.0), reference.dequantize().nan_to_num(7.0))


def assert_near(ours: Tensor, reference: Tensor, steps: Tensor) -> None:
    """Within the rounding of FP32 sums in another order: `steps` = the sum of the absolute values of the products."""
    assert ours.dtype == reference.dtype and ours.shape == reference.shape
    assert ((ours.double() - reference.double()).abs() <= 1e-5 * steps.double() + 1e-30).all()


def magnitude(a: Quantized, b: Quantized) -> Tensor:
    return a.dequantize().abs() @ b.dequantize().abs().transpose(-1, -2)


def test_every_number_of_e4m3_and_what_lies_between() -> None:
    """All 127 sizes, the midpoints between neighbours, and the floats right beside those; a row's scale is 1."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (grid[1:] + grid[:-1]) / 2
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    x = torch.cat([grid, middle, middle.nextafter(up), middle.nextafter(down), torch.tensor([448.0])])
    x = torch.cat([x, -x])
    rows = torch.nn.functional.pad(x, (0, -len(x) % 127)).view(-1, 127)
    rows = torch.cat([rows, torch.full((len(rows), 1), 448.0)], 1)
    quantised = OURS.quantize(rows)
    assert (quantised.scales == 1).all()
    assert_equal(quantised, REFERENCE.quantize(rows))
    assert torch.equal(quantised.values[0, :127].float(), grid)


@few
@given(sizes, sizes, seeds, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_tiles_and_blocks(M: int, K: int, seed: int, power_of_two: bool, dtype: torch.dtype, special: bool) -> None:
    x = random(seed, M, K, dtype=dtype)
    if special:
        x = with_special_values(x, seed)
    for view in (x, x.t()):
        assert_equal(OURS.quantize(view, power_of_two), REFERENCE.quantize(view, power_of_two))
        assert_equal(OURS.quantize_weight(view, power_of_two), REFERENCE.quantize_weight(view, power_of_two))
    stacked = torch.stack([x, -2 * x])
    assert_equal(OURS.quantize_weight(stacked, power_of_two), REFERENCE.quantize_weight(stacked, power_of_two))


@few
@given(counts_of, sizes, seeds, st.booleans(), st.booleans())
def test_transposed(counts: list[int], K: int, seed: int, power_of_two: bool, special: bool) -> None:
    x = random(seed, sum(counts), K)
    if special and x.numel():
        x = with_special_values(x, seed)
    for groups in (counts, None):
        assert_equal(
            OURS.quantize_transposed(x, groups, power_of_two), REFERENCE.quantize_transposed(x, groups, power_of_two)
        )
        tiles = REFERENCE.quantize(x)
        assert_equal(
            OURS.requantize_transposed(tiles, groups, power_of_two),
            REFERENCE.requantize_transposed(tiles, groups, power_of_two),
        )


@few
@given(sizes, sizes, seeds, st.booleans(), st.integers(0, 40))
def test_permute(T: int, D: int, seed: int, power_of_two: bool, R: int) -> None:
    x = random(seed, T, D, dtype=torch.bfloat16)
    index = torch.randint(T, (R,), generator=torch.Generator().manual_seed(seed))
    assert_equal(OURS.permute_quantize(x, index, power_of_two), REFERENCE.permute_quantize(x, index, power_of_two))


@few
@given(sizes, sizes, seeds, st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_swiglu(R: int, F: int, seed: int, weighted: bool, power_of_two: bool, dtype: torch.dtype) -> None:
    """The two exponentials differ in the last bit: so may a scale, and so, rarely, a value by one step of E4M3."""
    gate_up = random(seed, R, 2 * F, dtype=dtype)
    gates = torch.rand(R, generator=torch.Generator().manual_seed(seed)) if weighted else None
    ours, expected = (b.swiglu_quantize(gate_up, gates, power_of_two) for b in (OURS, REFERENCE))
    torch.testing.assert_close(ours.scales, expected.scales, rtol=1e-6, atol=0)
    a, b = (q.values.view(torch.int8).int() for q in (ours, expected))
    assert ((a - b).abs() <= 1)[b.abs() > 0].all()
    assert (a != b).sum() <= 2 + a.numel() // 100


@few
@given(sizes, sizes, sizes, seeds)
def test_the_three_products_of_a_linear(T: int, N: int, K: int, seed: int) -> None:
    x, w, dy = random(seed, T, K), random(seed + 1, N, K), random(seed + 2, T, N)
    xq, wq, dyq = OURS.quantize(x), OURS.quantize_weight(w), OURS.quantize(dy)
    for a, b in ((xq, wq), (dyq, wq.transposed())):
        assert_near(OURS.gemm(a, b, torch.float32), REFERENCE.gemm(a, b, torch.float32), magnitude(a, b))
    a, b = OURS.quantize_transposed(dy), OURS.requantize_transposed(xq)
    ours, expected = (torch.ones(N, K) for _ in range(2))
    OURS.add_wgrad(ours, a, b)
    REFERENCE.add_wgrad(expected, a, b)
    assert_near(ours, expected, magnitude(a, b) + 1)


@few
@given(counts_of, sizes, sizes, seeds)
def test_the_three_products_of_experts(counts: list[int], N: int, K: int, seed: int) -> None:
    R, E = sum(counts), len(counts)
    x, w, dy = random(seed, R, K), random(seed + 1, E, N, K), random(seed + 2, R, N)
    xq, wq, dyq = OURS.quantize(x), OURS.quantize_weight(w), OURS.quantize(dy)
    for a, b in ((xq, wq), (dyq, wq.transposed())):
        ours, expected = (backend.grouped_gemm(a, b, counts, torch.float32) for backend in (OURS, REFERENCE))
        wide = [r @ s.t() for r, s in zip(a.dequantize().abs().split(counts), b.dequantize().abs(), strict=True)]
        assert_near(ours, expected, torch.cat(wide))
    a, b = OURS.quantize_transposed(dy, counts), OURS.requantize_transposed(xq, counts)
    ours, expected = (torch.ones(E, N, K) for _ in range(2))
    OURS.add_grouped_wgrad(ours, a, b, counts)
    REFERENCE.add_grouped_wgrad(expected, a, b, counts)
    assert_near(ours, expected, (magnitude(a, b) + 1).expand(E, N, K))
    assert (ours[[c == 0 for c in counts]] == 1).all()


@pytest.mark.parametrize("counts", [None, [40, 0, 90]])
@pytest.mark.parametrize("name", ["mlp_down", "experts_down", "attention_output"])
def test_layers_by_our_kernels_and_by_the_reference(name: str, counts: list[int] | None) -> None:
    """Linear after SwiGLU, forward and backward with the weight gradient put off, as a model's layers do them."""
    gate_up = random(0, 130, 2 * 72, dtype=torch.bfloat16).clamp(-20, 20)
    weight = random(1, 3, 100, 72).clamp(-3, 3) if counts else random(1, 100, 72).clamp(-3, 3)
    dy, gates = random(2, 130, 100).bfloat16(), torch.rand(130, generator=torch.Generator().manual_seed(0))
    results = []
    for backend in (OURS, REFERENCE):
        w, x, queue = torch.nn.Parameter(weight.clone()), gate_up.clone().requires_grad_(), WeightGradQueue()
        with queue.record(0):
            y = Fp8Precision(backend).of(name).swiglu_linear(x, gates, w, counts, make_kernels(False), queue)
            y.backward(dy)
        assert w.grad is None
        queue.run(0)
        results.append((y, x.grad, w.grad))
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        difference = (ours.float() - expected.float()).norm() / expected.float().norm()
        assert difference < 1e-2  # the interpreter cuts off to BF16 where a GPU rounds
    assert counts is None or not results[0][2][1].any()


def test_products_round_to_bf16() -> None:
    a, b = OURS.quantize(random(0, 70, 200)), OURS.quantize_weight(random(1, 140, 200))
    ours, exact = OURS.gemm(a, b), OURS.gemm(a, b, torch.float32)
    assert ours.dtype == torch.bfloat16
    assert ((ours.float() - exact).abs() <= exact.abs() / 128).all()  # the interpreter cuts off, a GPU rounds


def test_a_nan_reaches_the_product() -> None:
    x = random(0, 5, 300)
    x[2, 200] = torch.inf
    out = OURS.gemm(OURS.quantize(x), OURS.quantize_weight(random(1, 7, 300)))
    assert torch.equal(out.isnan().any(1), torch.tensor([False, False, True, False, False]))
    assert out[2].isnan().all()


def test_operands_that_do_not_fit() -> None:
    a, b = OURS.quantize(torch.ones(4, 256)), OURS.quantize_weight(torch.ones(8, 128))
    with pytest.raises(ValueError, match=r"a \(4, 256\).*b \(8, 128\)"):
        OURS.gemm(a, b)
    with pytest.raises(ValueError, match=r"counts \[1, 2\] do not divide 4 rows among 2 groups"):
        OURS.grouped_gemm(a, OURS.quantize_weight(torch.ones(2, 8, 256)), [1, 2])
    with pytest.raises(ValueError, match=r"4 rows, but the groups are of \[3\]: 3 in all"):
        OURS.quantize_transposed(torch.ones(4, 256), [3])
    with pytest.raises(ValueError, match="contiguous out"):
        tiles = OURS.quantize_transposed(torch.ones(128, 4))
        OURS.add_wgrad(torch.zeros(4, 8)[:, ::2], tiles, tiles)
