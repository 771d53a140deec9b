"""Generation with the C++ kernels (`compile=on`): against the plain ways, the training forward, and one by one."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import fused
from model.config import ModelConfig
from model.cpu import kernels as library
from model.decode import Decoder, Piece
from model.functional import make_kernels
from model.router import choose_experts
from model.stage import ModelStage
from parallel.whole import empty_model
from serving import generate
from serving.engine import CacheSize, Engine
from serving.load import wants_kernels
from serving.scheduler import Limits
from tests.alone import run_alone
from tests.serving_cluster import write_model
from tests.test_decode import CONFIG, CONFIGS, LENGTH, decoded_logits, model_of, rows, training_logits
from tests.test_engine import MAX, requests, together

needs_avx512 = pytest.mark.skipif(not library.suits(torch.empty(0)), reason="the kernels need AVX-512 and oneDNN")


def fused_model(config: ModelConfig) -> ModelStage:
    """`model_of` in FP32, with the kernels."""
    model = empty_model(config, "fp32", cpp=True)
    model.load_state_dict(model_of(config, "fp32").state_dict())
    return model


def plain_experts(x_TD: Tensor, gates_TK: Tensor, slots_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    y_TD = torch.zeros_like(x_TD)
    for t, k in torch.cartesian_prod(*map(torch.arange, slots_TK.shape)).tolist():
        gate, up = (gate_up[slots_TK[t, k]] @ x_TD[t]).chunk(2)
        y_TD[t] += gates_TK[t, k] * (down[slots_TK[t, k]] @ (torch.nn.functional.silu(gate) * up))
    return y_TD


@needs_avx512
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_experts_of_any_shape_equal_plain_products(data: st.DataObject) -> None:
    """Experts with no rows, with few and with many tiles; widths that are no multiple of a vector."""
    T, D, F, E = (data.draw(st.integers(1, most)) for most in (300, 50, 50, 6))
    K = data.draw(st.integers(1, E))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x, gates = torch.randn(T, D, generator=generator), torch.rand(T, K, generator=generator)
    slots = torch.rand(T, E, generator=generator).argsort(1)[:, :K].contiguous()
    weights = torch.randn(E, 2 * F, D, generator=generator) / D**0.5, torch.randn(E, D, F, generator=generator) / F**0.5
    ours = library.kernels().experts(x, gates, slots, *weights)
    exact = plain_experts(x.double(), gates.double(), slots, *(w.double() for w in weights))
    assert float((ours - exact).abs().max()) <= 2e-6 * float(exact.abs().max())


@needs_avx512
@pytest.mark.parametrize("rows", [0, 1, 9, 600, 1024])
def test_an_mlp_is_added_to_the_residual_stream(rows: int) -> None:
    """Of few rows by torch's products, of many as a single expert; what it is added to stays as it was."""
    generator = torch.Generator().manual_seed(rows)
    layer = next(layer for layer in fused_model(CONFIG).layers.values() if not layer.is_moe)
    h, x = torch.randn(2, rows, CONFIG.hidden_size, generator=generator).unbind()
    before, (gate_up, down) = (
        h.clone(),
        (linear.weight.detach().double() for linear in (layer.mlp.gate_up, layer.mlp.down)),
    )
    gate, up = (x.double() @ gate_up.T).chunk(2, dim=1)
    exact = h.double() + (torch.nn.functional.silu(gate) * up) @ down.T
    with torch.no_grad():
        ours = fused.add_mlp(h, x, layer.mlp)
    assert float((ours - exact).norm()) <= 1e-6 * float(exact.norm())
    assert torch.equal(h, before)


@needs_avx512
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_norms_and_swiglu_of_rows_that_lie_apart(data: st.DataObject) -> None:
    R, D = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 300))
    wide = torch.randn(R, 2 * D + 3, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    weight, rows = torch.randn(D), wide[:, 1 : 1 + D]
    plain, ours = make_kernels(False), make_kernels(False, cpp=True)
    for x, arguments in ((rows, (weight, 1e-6)), (rows.contiguous(), (weight, 1e-6))):
        exact = plain.norm(x.double(), arguments[0].double(), arguments[1])
        assert float((ours.norm(x, *arguments) - exact).norm()) <= 1e-6 * float(exact.norm())
    exact = plain.swiglu(wide[:, 3:].double(), None)
    assert float((ours.swiglu(wide[:, 3:], None) - exact).norm()) <= 1e-6 * float(exact.norm())
    assert torch.equal(ours.swiglu(wide[:, 3:].double(), None), exact), "another precision goes its own way"


@needs_avx512
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_choice_of_experts_is_the_same(data: st.DataObject) -> None:
    """Ties among them, and NaN, which must lead to as many different experts as anything else."""
    T, groups, width = (data.draw(st.integers(least, most)) for least, most in ((0, 40), (1, 6), (1, 6)))
    kept = data.draw(st.integers(1, groups))
    K = data.draw(st.integers(1, kept * width))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    biased = torch.randint(-3, 4, (T, groups * width), generator=generator).float() / 4
    missing = data.draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    biased[torch.rand(biased.shape, generator=generator) < missing] = float("nan")
    ours = library.kernels().choose_experts(biased, groups, kept, K)
    assert torch.equal(ours, choose_experts(biased, groups, kept, K))


@needs_avx512
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("cuts", [list(range(1, LENGTH)), [], [7, 8, 30], [25]], ids=["tokens", "whole", "mix", "two"])
def test_every_position_equals_the_training_forward(config: ModelConfig, cuts: list[int]) -> None:
    model, tokens = fused_model(config), rows(3)
    assert Decoder(model, 1).fused
    ours, wanted = decoded_logits(model, tokens, cuts), training_logits(model_of(config, "fp32"), tokens)
    assert float((ours - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


@needs_avx512
def test_a_prompt_s_logits_do_not_depend_on_the_other_prompts_of_a_step() -> None:
    """Of equal and of other lengths, beside a sequence that only goes on: in their last digits alone."""
    decoder, tokens = Decoder(fused_model(CONFIG), 6 * LENGTH), rows(6)
    slots = torch.arange(6 * LENGTH).view(6, LENGTH)
    decoder.forward(decoder.batch([Piece(tokens[0][:39], slots[0, :39])]))
    lengths = [40, 40, 30, 40, 7]
    fresh = [Piece(tokens[i][:n], slots[i, :n]) for i, n in enumerate(lengths, 1)]
    both = decoder.logits(decoder.forward(decoder.batch([Piece(tokens[0][39:], slots[0]), *fresh])))
    for piece, logits in zip(fresh, both[1:].split(lengths), strict=True):
        one = decoder.logits(decoder.forward(decoder.batch([piece])))
        assert float((logits - one).abs().max()) <= 1e-5 * float(one.abs().max())


@needs_avx512
def test_random_interleavings_equal_one_by_one_without_the_kernels() -> None:
    """Greedy, with a cache that is often full, prompts in pieces, and drafts."""
    model, plain, preempted = fused_model(CONFIG), model_of(CONFIG, "fp32"), 0
    for seed in range(20):
        wanted, chance = requests(6, seed), random.Random(seed)
        limits = Limits(chance.choice((2, 4, 8)), chance.choice((16, 64)), 99)
        e = Engine(model, MAX, CacheSize(chance.choice((16, 24, 40)), 4), limits, seed % 2 == 1)
        made = together(e, wanted, chance, cancel=seed % 3 == 0)
        for r in wanted:
            if r.id in made:
                assert made[r.id] == run_alone(Engine(plain, MAX, CacheSize(64, 4)), r), (seed, r)
        preempted += e.scheduler.preemptions
    assert preempted > 5


def test_the_last_layer_leaves_out_rows_that_nobody_looks_at() -> None:
    """In FP64: the same hidden states; the latents of all rows are there for the tokens to come."""
    tokens, slots = rows(4), torch.arange(4 * LENGTH).view(4, LENGTH)
    pieces = [Piece(row[:n], s[:n]) for row, s, n in zip(tokens, slots, (30, 1, 17, 8), strict=True)]
    whole, less = (Decoder(model_of(CONFIG), 4 * LENGTH) for _ in range(2))
    wanted = less.wanted(pieces, [1, 1, 2, 0])
    assert wanted is not None
    all_rows = whole.forward(whole.batch(pieces))
    some = less.forward(less.batch(pieces), wanted=wanted)
    assert torch.allclose(some, all_rows[[29, 30, 46, 47]], rtol=1e-11, atol=1e-11)
    assert torch.allclose(less.cache.latents, whole.cache.latents, rtol=1e-11, atol=1e-11)
    nothing = less.forward(less.batch(pieces), wanted=less.wanted(pieces, [0] * 4))
    assert nothing.shape == (0, CONFIG.hidden_size)
    assert less.wanted(pieces[:2], [30, 1]) is None
    assert int(less.loads["2"].sum()) == 4 * CONFIG.experts_per_token


@needs_avx512
def test_the_command_with_the_kernels_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"checkpoint={write_model(tmp_path / 'model')}", "prompt=import os, sys, time and more than a few words",
             "tokens=30", "temperature=0"]  # fmt: skip
    said = []
    for compile in ("off", "on"):
        assert generate.main([*words, f"compile={compile}"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("compile", "precision", "message"),
    [("fast", "fp32", "choose on or off"), ("on", "bf16", "compile=on is for precision=fp32 on a CPU with AVX-512")],
)
def test_what_the_kernels_cannot_do_is_said(compile: str, precision: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wants_kernels(compile, precision, torch.device("cpu"))
    assert not wants_kernels("off", precision, torch.device("cpu"))


def test_other_precisions_go_their_own_ways() -> None:
    for precision in ("fp64", "bf16", "fp8"):
        config = replace(CONFIG, mtp_depth=0)
        assert not Decoder(empty_model(config, precision, cpp=True), 1).fused
