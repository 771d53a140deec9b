"""The attention core and the products under it, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import model.attend
from benchmarks.peer import our_model
from model.attend import Documents, attend, attend_backward
from model.attention import AttentionContext, LatentAttention
from model.config import ModelConfig
from model.products import ROW_STEP, add_grouped_weight_grads, grouped_product, product
from model.rope import rotation


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=2, max_size=2), st.integers(2, 7))
@settings(max_examples=60, deadline=None)
def test_blocks_equal_masked_attention(lengths: list[list[int]], rows: int) -> None:
    """Documents of any length, blocks that cut them anywhere, values wider or narrower than queries."""
    S = min(sum(row) for row in lengths)
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r))[:S] for r in lengths])
    q, k, v = random(2, 3, S, 4), random(2, 3, S, 4, seed=1), random(2, 3, S, 6, seed=2)
    dout = random(2, 3, S, 6, seed=3)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    plain = Documents(documents)
    wanted = F.scaled_dot_product_attention(*leaves, attn_mask=plain.mask_B1SS, scale=1.0)
    grads = torch.autograd.grad(wanted, leaves, dout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.attend, "ROWS", rows)
        torch.testing.assert_close(attend(q, k, v, plain), wanted.detach(), rtol=1e-10, atol=1e-12)
        for ours, theirs in zip(attend_backward(dout, q, k, v, plain), grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_blocks_skip_documents_that_have_ended() -> None:
    documents = torch.tensor([[0] * 600 + [1] * 400])
    (blocks,) = Documents(documents).blocks
    assert [(b.rows.start, b.rows.stop, b.keys.start) for b in blocks] == [
        (0, 256, 0), (256, 512, 0), (512, 768, 0), (768, 1000, 600)
    ]  # fmt: skip
    borders, longest = Documents(documents).borders
    assert borders.tolist() == [0, 600, 1000]
    assert longest == 600


@pytest.mark.parametrize(("document", "growth"), [(8192, 1), (100, 4)])
def test_masks_are_at_most_linear_in_the_sequence(document: int, growth: int) -> None:
    """Inside one document all blocks share one mask."""
    sizes = []
    for length in (1024, 4096):
        (blocks,) = Documents(torch.arange(length).div(document, rounding_mode="floor").unsqueeze(0)).blocks
        masks = {block.mask.untyped_storage().data_ptr(): block.mask.untyped_storage().nbytes() for block in blocks}
        sizes.append(sum(masks.values()))
    assert sizes[1] <= 1.1 * growth * sizes[0]


def test_recomputation_keeps_the_latents_alone_and_gives_the_same() -> None:
    """What the attention function keeps for backward, and the gradients of the input."""
    kept, outputs = {}, {}
    for recompute in (False, True):
        config = ModelConfig(recompute=recompute)
        stage = our_model(config, "fp64", seed=1).stages[0]
        attention = stage.layers["0"].attention
        assert isinstance(attention, LatentAttention)
        positions = torch.arange(32).unsqueeze(0)
        context = AttentionContext(torch.zeros(1, 32, dtype=torch.int64), *rotation(positions, config, torch.float64))
        x = random(1, 32, config.hidden_size).requires_grad_()
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = attention(x, context)
        out.backward(random(*out.shape, seed=5))
        weights = {id(p.untyped_storage()): p for p in attention.parameters()}
        kept[recompute] = sum(sizes.values()) - sum(8 * p.numel() for p in weights.values() if p.dim() == 2)
        grads = [p.grad for p in attention.parameters()]
        outputs[recompute] = [out.detach(), x.grad, *grads]
    assert all(torch.equal(a, b) for a, b in zip(*outputs.values(), strict=True) if a is not None and b is not None)
    c = ModelConfig()
    wide = 8 * 32 * c.num_heads * (2 * c.head_dim + c.rope_dim + c.value_dim)
    assert kept[False] - kept[True] >= wide


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_take_any_layout(dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    a, b = random(20, 48, dtype=dtype), random(30, 48, seed=1, dtype=dtype)
    wide = random(30, 96, seed=1, dtype=dtype)
    for left, right in ((a, b), (a.t().contiguous().t(), b), (a, b.t().contiguous().t()), (a, wide[:, ::2])):
        wanted = left.double() @ right.double().t()
        assert float((product(left, right).double() - wanted).norm() / wanted.norm()) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[0, 5, 0, ROW_STEP, 1], [ROW_STEP + 3, 0, 2, 40, 0], [0, 0, 0, 0, 0]])
def test_grouped_products_and_their_weight_gradients(dtype: torch.dtype, counts: list[int]) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    rows = sum(counts)
    x, dy = random(rows, 16, dtype=dtype), random(rows, 24, seed=1, dtype=dtype)
    weight = random(5, 24, 16, seed=2, dtype=dtype)
    grad = torch.ones(5, 24, 16, dtype=torch.promote_types(dtype, torch.float32))
    out = grouped_product(x, weight, counts)
    add_grouped_weight_grads(grad, dy, x, counts)
    parts = zip(range(5), x.double().split(counts), dy.double().split(counts), out.double().split(counts), strict=True)
    for expert, x_e, dy_e, out_e in parts:
        torch.testing.assert_close(out_e, x_e @ weight[expert].double().t(), rtol=tolerance, atol=10 * tolerance)
        torch.testing.assert_close(grad[expert].double(), 1 + dy_e.t() @ x_e, rtol=tolerance, atol=10 * tolerance)
