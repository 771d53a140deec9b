"""Our C++ kernels (`compile=on`) give what torch's operators give, for any shape, packed documents and both dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import AttentionContext, HeadSizes, _FromHeads
from model.batch import IGNORE
from model.cpu import kernels as library
from model.loss import head_loss
from model.products import add_grouped_weight_grads, add_weight_grad, grouped_product

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
@settings(max_examples=25, deadline=None, derandomize=True)  # one tiny case in fifty cancels to where BF16 rounds
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


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_grouped_products_equal_torchs(dtype: torch.dtype, data: st.DataObject) -> None:
    """Forward, the rows' gradient, and the weights' gradients added to what is there; experts may have no rows."""
    counts = data.draw(st.lists(st.one_of(st.just(0), st.integers(1, 300)), min_size=1, max_size=12))
    N, K = 16 * data.draw(st.integers(1, 20)), 16 * data.draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    E, R = len(counts), sum(counts)
    x, dy, weight, before = draw(R, K), draw(R, N), draw(E, N, K), torch.randn(E, N, K, generator=generator)

    def results(compiled: bool, to: torch.dtype, grad: torch.dtype) -> list[Tensor]:
        x_RK, dy_RN, weight_ENK, grad_ENK = x.to(to), dy.to(to), weight.to(to), before.to(grad, copy=True)
        out = grouped_product(x_RK, weight_ENK, counts, compiled)
        dx = grouped_product(dy_RN, weight_ENK.mT, counts, compiled)
        add_grouped_weight_grads(grad_ENK, dy_RN, x_RK, counts, compiled)
        dense_NK = before[0].to(grad, copy=True)
        add_weight_grad(dense_NK, dy_RN, x_RK, compiled)
        return [out, dx, grad_ENK, dense_NK]

    exact = results(False, torch.float64, torch.float64)
    for mine, theirs, given_in in zip(
        results(True, dtype, torch.float32), exact, (dtype, dtype, *2 * (torch.float32,)), strict=True
    ):
        assert mine.dtype == given_in
        assert distance(mine, theirs) <= TOLERANCE[given_in]


@needs_avx512
def test_counts_that_do_not_fit_the_rows_are_refused() -> None:
    with pytest.raises(RuntimeError, match="counts have 3 rows, the tensor 4"):
        grouped_product(torch.ones(4, 16), torch.ones(2, 16, 16), [1, 2], compiled=True)


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_widths_stay_with_torch(dtype: torch.dtype) -> None:
    x, weight = torch.ones(4, 24, dtype=dtype), torch.ones(2, 16, 24, dtype=dtype)
    assert torch.equal(grouped_product(x, weight, [1, 3], compiled=True), torch.full((4, 16), 24, dtype=dtype))


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(T=st.integers(1, 200), V=st.integers(1, 100), z_scale=st.sampled_from([0.0, 0.01]), seed=st.integers(0, 99))
def test_losses_equal_torchs(dtype: torch.dtype, T: int, V: int, z_scale: float, seed: int) -> None:
    """Both losses and the logits' gradient; some targets are left out."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = 4 * torch.randn(T, V, generator=generator).to(dtype)
    targets_T = torch.randint(0, V, (T,), generator=generator)
    targets_T[torch.rand(T, generator=generator) < 0.2] = IGNORE

    def results(to: torch.dtype, compiled: bool) -> list[Tensor]:
        leaf = logits_TV.to(to, copy=True).requires_grad_()
        losses = head_loss(leaf, lambda x, may_defer: x.clone(), V, targets_T, 1 / T, z_scale, compiled)
        return [*losses, *torch.autograd.grad(sum(losses), leaf)]

    for mine, theirs in zip(results(dtype, True), results(torch.float64, False), strict=True):
        assert float((mine.detach().double() - theirs.detach()).norm()) <= TOLERANCE[dtype] * max(
            float(theirs.detach().norm()), 1 / T
        )


@needs_avx512
def test_a_target_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RuntimeError, match="target 7 is not in a vocabulary of 5"):
        library.kernels().token_losses(torch.zeros(2, 5), torch.tensor([1, 7]))


@needs_avx512
def test_a_build_that_was_killed_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch leaves a file called `lock` behind then, and waits for it to go."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    built: list[bool] = []

    def load(name: str, sources: list[str], flags: list[str], build_directory: str, **rest: object) -> None:
        built.append(not (Path(build_directory) / "lock").exists())

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    library.kernels.__wrapped__()
    (folder,) = tmp_path.iterdir()
    (folder / "lock").touch()
    library.kernels.__wrapped__()
    assert built == [True, True]
