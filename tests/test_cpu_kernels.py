"""Our C++ kernels (`compile=on`) give what torch's operators give, for any shape, packed documents and both dtypes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.attend import Documents
from model.attention import AttentionContext, HeadSizes, _FromHeads
from model.batch import IGNORE
from model.cpu import kernels as library
from model.loss import head_loss
from model.precisions import make_precision
from model.products import add_grouped_weight_grads, add_weight_grad, grouped_product
from model.protocols import AtOnce

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # beside FP64; twice what rounding once, or inside, explains
needs_avx512 = pytest.mark.skipif(not library.suits(torch.empty(0)), reason="the kernels need AVX-512 and oneDNN")


def distance(ours: Tensor, exact: Tensor) -> float:
    ours, exact = ours.detach(), exact.detach()
    return float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-9))


@dataclass(frozen=True)
class AttentionCase:
    """Operands (rounded to BF16, so that every dtype starts from the same) and what attention gives for them."""

    sizes: HeadSizes
    documents_BS: Tensor
    seed: int

    def operands(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
        """(q_up, kv_up, k_rope), the output's gradient, and the rotation's angles."""
        generator = torch.Generator().manual_seed(self.seed)
        (B, S), z = self.documents_BS.shape, self.sizes

        def draw(width: int) -> Tensor:
            return torch.randn(B, S, width, generator=generator).bfloat16().to(dtype)

        heads = [draw(z.H * (z.N + z.R)).requires_grad_(), draw(z.H * (z.N + z.V)).requires_grad_()]
        heads.append(draw(z.R).requires_grad_())
        angles = torch.randn(B, S, z.R // 2, generator=generator).to(torch.promote_types(dtype, torch.float32))
        return heads, draw(z.H * z.V), angles

    def results(self, dtype: torch.dtype, compiled: bool) -> list[Tensor]:
        """Output and gradients in `dtype`."""
        heads, dout, angles = self.operands(dtype)
        context = AttentionContext(self.documents_BS, angles.cos(), angles.sin())
        out = _FromHeads.apply(*heads, replace(self.sizes, compiled=compiled), context)
        return [out, *torch.autograd.grad(out, heads, dout)]

    def with_errors(self, error: float, seed: int = 0) -> list[Tensor]:
        """The same in FP64 by the kernels' formulas, with a random relative error of up to `error` in every value that
        they round: queries, keys, shares and their gradients, what comes out, and with it what backward subtracts."""
        (q_up, kv_up, k_rope), dout, angles = self.operands(torch.float64)
        (B, S), z = self.documents_BS.shape, self.sizes
        generator = torch.Generator().manual_seed(seed)

        def rounded(x: Tensor) -> Tensor:
            return x * (1 + error * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1))

        def turned(x_BSHR: Tensor, direction: int) -> Tensor:
            pairs, turn = x_BSHR.unflatten(-1, (-1, 2)), torch.polar(torch.ones_like(angles), direction * angles)
            return torch.view_as_real(torch.view_as_complex(pairs.clone()) * turn.unsqueeze(2)).flatten(-2)

        def by_head(x_BSX: Tensor) -> Tensor:
            return x_BSX.detach().view(B, S, z.H, -1)

        def widened(x_BSHX: Tensor) -> Tensor:
            return rounded(torch.cat((x_BSHX[..., : z.N], turned(x_BSHX[..., z.N :], 1)), -1)).transpose(1, 2)

        keys, values = by_head(kv_up).split((z.N, z.V), -1)
        q = widened(by_head(q_up))
        k = widened(torch.cat((keys, k_rope.detach().unsqueeze(2).expand(-1, -1, z.H, -1)), -1))
        v, dy = values.transpose(1, 2), by_head(dout).transpose(1, 2)
        documents = Documents(self.documents_BS)
        p = (z.scale * q @ k.mT).masked_fill(~documents.mask_B1SS, float("-inf")).softmax(-1)
        out = rounded(rounded(p) @ v)
        slopes = dy @ v.mT - (dy * out).sum(-1, keepdim=True)
        alone_B1S1 = documents.mask_B1SS.sum(-1, keepdim=True) == 1
        ds = rounded(rounded(p) * slopes).masked_fill(alone_B1S1, 0) * z.scale
        dq, dk, dv = (x.transpose(1, 2) for x in (ds @ k, ds.mT @ q, rounded(p).mT @ dy))
        dq = torch.cat((dq[..., : z.N], turned(dq[..., z.N :], -1)), -1).flatten(2)
        dk_rope = turned(dk[..., z.N :].sum(2, keepdim=True), -1).flatten(2)
        dkv = torch.cat((dk[..., : z.N], dv), -1).flatten(2)
        return [out.transpose(1, 2).flatten(2), rounded(dq), rounded(dkv), rounded(dk_rope)]


@st.composite
def attention_cases(draw: st.DrawFn) -> AttentionCase:
    B, S, H = (draw(st.integers(1, most)) for most in (3, 300, 3))
    N, R, V = draw(st.integers(1, 40)), 2 * draw(st.integers(1, 10)), draw(st.integers(1, 40))
    borders = torch.tensor(draw(st.lists(st.integers(0, S), min_size=B, max_size=5 * B)))
    documents_BS = torch.zeros(B, S + 1, dtype=torch.int64)
    documents_BS[torch.arange(len(borders)) % B, borders] = 1
    documents_BS = documents_BS.cumsum(1)[:, :S]
    return AttentionCase(HeadSizes(H, N, R, V, 0.2), documents_BS, draw(st.integers(0, 99)))


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(case=attention_cases())
def test_attention_equals_the_one_in_blocks(dtype: torch.dtype, case: AttentionCase) -> None:
    """The FP64 one. In one small case of fifty the gradients of queries cancel, and rounding is what is left: there the
    bound is twice what random errors of rounding's size, where the kernels round, make of the same FP64 result."""
    ours, exact = case.results(dtype, compiled=True), case.results(torch.float64, compiled=False)
    assert all(mine.dtype == dtype for mine in ours)
    found = [distance(mine, theirs) for mine, theirs in zip(ours, exact, strict=True)]
    bounds = [TOLERANCE[dtype]] * len(found)
    if max(found) > TOLERANCE[dtype]:
        for seed in range(16):
            rounded = case.with_errors(torch.finfo(dtype).eps / 2, seed)
            explained = [2 * distance(theirs, at) for theirs, at in zip(rounded, exact, strict=True)]
            bounds = [max(pair) for pair in zip(bounds, explained, strict=True)]
    assert all(value <= bound for value, bound in zip(found, bounds, strict=True)), (found, bounds)


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_are_alone_change_no_score(dtype: torch.dtype) -> None:
    """A query that sees one key has a share of 1 whatever the score: no gradient for it, not even rounding's."""
    case = AttentionCase(HeadSizes(2, 20, 8, 24, 0.2), torch.arange(70).unsqueeze(0), 0)
    _, dq, dkv, dk_rope = case.results(dtype, compiled=True)
    assert not dq.any() and not dk_rope.any() and not dkv.view(-1, 2, 44)[..., :20].any()
    assert dkv.any()


@needs_avx512
@settings(max_examples=10, deadline=None)
@given(case=attention_cases())
def test_without_errors_the_model_of_rounding_is_exact(case: AttentionCase) -> None:
    for mine, theirs in zip(case.with_errors(0.0), case.results(torch.float64, compiled=False), strict=True):
        assert distance(mine, theirs) <= 1e-11


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_grouped_products_equal_torchs(dtype: torch.dtype, data: st.DataObject) -> None:
    """Forward, the rows' gradient, and the weights' gradients, added to what is there or fresh, over anything; experts
    may have no rows."""
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
        fresh_ENK, fresh_NK = torch.full_like(grad_ENK, torch.nan), torch.full_like(dense_NK, torch.nan)
        add_grouped_weight_grads(fresh_ENK, dy_RN, x_RK, counts, compiled, fresh=True)
        add_weight_grad(fresh_NK, dy_RN, x_RK, compiled, fresh=True)
        return [out, dx, grad_ENK, dense_NK, fresh_ENK, fresh_NK]

    exact = results(False, torch.float64, torch.float64)
    for mine, theirs, given_in in zip(
        results(True, dtype, torch.float32), exact, (dtype, dtype, *4 * (torch.float32,)), strict=True
    ):
        assert mine.dtype == given_in
        assert distance(mine, theirs) <= TOLERANCE[given_in]


@needs_avx512
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_gradient_is_written_and_then_added_to(name: str) -> None:
    """The first micro-batch writes it, the second adds: as if both had added to zeros. A view of a buffer, as buckets
    have them, goes on being added to, wherever it begins."""
    precision, _ = make_precision(name, compiled=True)
    products, queue = precision.of("experts_gate_up"), AtOnce()
    start = torch.randn(3, 32, 16, generator=torch.Generator().manual_seed(0))
    written, added = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    room = torch.zeros(1 + start.numel())
    added.grad = room[1:].view_as(start)
    for seed, counts in enumerate(([5, 0, 9], [0, 0, 14])):
        x_RI = torch.randn(14, 16, generator=torch.Generator().manual_seed(seed)).to(precision.dtype).requires_grad_()
        for weight in (written, added):
            products.grouped_linear(x_RI, weight, counts, queue).sum().backward()
        assert torch.equal(written.grad, added.grad)
        assert not written.grad[1].any()
    assert written.grad[2].any() and room.data_ptr() + 4 == added.grad.data_ptr()


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
