"""The router's choice, its bias, the balance losses and the counts, against hand-computed values and naive formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from dualpipe.wgrad import WeightGradQueue
from model.balance import (
    Balance,
    Counts,
    balance_loss,
    count,
    max_violation,
    routing_loss,
    uniform_experts,
    update_bias,
)
from model.config import ModelConfig
from model.layers import Toolbox
from model.precision import CastPrecision
from model.router import Router, choose_experts
from training.balance import summarise
from training.heatmap import HeatMap

CONFIG = ModelConfig(hidden_size=8, num_experts=8, experts_per_token=3, num_groups=4, groups_per_token=2)


def make_router(balance: Balance = Balance(), config: ModelConfig = CONFIG, seed: int = 0) -> Router:  # noqa: B008
    tools = Toolbox(CastPrecision(torch.float64), WeightGradQueue(), None, torch.float64, "cpu", balance)
    router = Router(config, tools)
    torch.nn.init.normal_(router.linear.weight, generator=torch.Generator().manual_seed(seed))
    return router


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, CONFIG.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- choice ------------------------------------------------------------------------------------------------------------


def naive_choice(row: list[float], groups: int, limit: int, k: int) -> list[int]:
    """Best groups by the sum of their two best scores, then best experts in them; ties to the lower index."""
    size = len(row) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    group_score = [sum(sorted((row[e] for e in m), reverse=True)[:2]) for m in members]
    kept = sorted(range(groups), key=lambda g: (-group_score[g], g))[:limit]
    allowed = [e for g in kept for e in members[g]]
    return sorted(allowed, key=lambda e: (-row[e], e))[:k]


@st.composite
def routing_problems(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, int]:
    groups, size = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    limit = draw(st.integers(1, groups))
    k = draw(st.integers(1, limit * size))
    # Few distinct values, so that ties are the rule; quarters, so that the sums of two are exact.
    values = st.integers(-4, 8).map(lambda n: n / 4)
    rows = draw(st.lists(st.lists(values, min_size=groups * size, max_size=groups * size), min_size=1, max_size=4))
    return torch.tensor(rows), groups, limit, k


@given(routing_problems())
def test_choice_is_the_naive_one_for_any_groups_and_limits(problem: tuple[torch.Tensor, int, int, int]) -> None:
    scores, groups, limit, k = problem
    chosen = choose_experts(scores, groups, limit, k).tolist()
    assert chosen == [naive_choice(row, groups, limit, k) for row in scores.tolist()]


def test_the_bias_moves_the_choice_and_not_the_gate() -> None:
    router = make_router()
    x = tokens(5)
    gates, experts, _ = router(x)
    unchosen = next(e for e in range(8) if e not in experts[0].tolist())
    router.bias_E[unchosen] = 10.0
    moved, now, _ = router(x)
    assert now[0, 0] == unchosen
    scores = torch.sigmoid(x @ router.linear.weight.detach().T)
    expected = scores[0][now[0]] / scores[0][now[0]].sum() * CONFIG.route_scale
    torch.testing.assert_close(moved[0].detach(), expected)
    assert not torch.equal(gates, moved)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(1, 64), st.integers(1, 40))
def test_forced_routing_is_uniform_within_the_node_limit(
    groups: int, size: int, limit: int, k: int, blocks: int
) -> None:
    limit = min(limit, groups)
    k = min(k, limit * size)
    chosen = uniform_experts(groups * blocks, groups * size, k, groups, limit, torch.device("cpu"))
    loads = torch.bincount(chosen.flatten(), minlength=groups * size)
    assert loads.max() - loads.min() <= 1
    for row in chosen.tolist():
        assert len(set(row)) == k
        assert len({e // size for e in row}) == min(k, limit)
    ragged = uniform_experts(groups * blocks + 1, groups * size, k, groups, limit, torch.device("cpu"))
    assert all(len(set(row)) == k for row in ragged.tolist())


def test_forced_routing_reaches_the_router() -> None:
    router = make_router(Balance(force="uniform"))
    routing = router(tokens(32))
    assert torch.bincount(routing.experts_TK.flatten(), minlength=8).tolist() == [12] * 8
    routing.gates_TK.sum().backward()


# -- counts and bias ---------------------------------------------------------------------------------------------------


def test_counts_and_update_by_hand() -> None:
    """Three tokens, eight experts in four groups, two experts each: loads, node visits, and what the bias becomes."""
    experts = torch.tensor([[0, 1], [0, 7], [2, 6]])
    share = torch.tensor([[1 / 8] * 8, [1 / 2, 1 / 2, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    row = count(experts, share, 4, torch.tensor(0.25))
    counts = Counts(row.unsqueeze(0), 8, 4)
    assert row.dtype == torch.int64
    assert counts.load_LE.tolist() == [[2, 1, 1, 0, 0, 0, 1, 1]]
    assert counts.visits_LG.tolist() == [[2, 1, 0, 2]]
    assert counts.tokens_L.tolist() == [3]
    assert counts.entropy_L.item() == pytest.approx(math.log(8) + math.log(2), abs=1e-6)
    assert counts.loss_L.item() == pytest.approx(0.25)
    bias = torch.tensor([[0.5, 0, 0, 0, 0, 0, 0, -0.5]], dtype=torch.float64)
    update_bias(bias, counts.load_LE, 0.01)  # mean load 6/8
    assert bias.tolist() == [[0.49, -0.01, -0.01, 0.01, 0.01, 0.01, -0.01, -0.51]]
    assert max_violation(counts.load_LE).item() == pytest.approx((2 - 0.75) / 0.75)


def test_an_exactly_balanced_expert_keeps_its_bias_at_any_size() -> None:
    """Loads beyond the 24 bits of an FP32 mean: one token more or less must still decide the sign."""
    load = torch.full((1, 3), 2**40)
    load[0, 0] += 1
    load[0, 2] -= 1
    bias = torch.zeros(1, 3)
    update_bias(bias, load, 1.0)
    assert bias.tolist() == [[-1.0, 0.0, 1.0]]


def test_recomputation_does_not_count_twice() -> None:
    router = make_router(Balance(sequence_loss=0.1))
    x = tokens(12).requires_grad_()

    def routed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return tuple(router(x, 2, 0.5))

    gates, experts, counts = checkpoint(routed, x, use_reentrant=False)
    router.record(counts)
    gates.sum().backward()
    assert router.counts_C[:8].sum() == 12 * 3
    assert torch.equal(router.counts_C[:8], torch.bincount(experts.flatten(), minlength=8))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(0.2, 2.0), st.sampled_from([(1, 1, 2), (4, 2, 4), (8, 4, 6)]))
def test_biases_balance_a_fixed_skewed_router(seed: int, skew: float, shape: tuple[int, int, int]) -> None:
    """Scores that prefer some experts, the same text over and over: MaxVio falls below 0.1.

    γ falls at the end, as in the report: where sigmoids saturate, many tokens lie within one step of the bias.
    """
    groups, limit, k = shape
    generator = torch.Generator().manual_seed(seed)
    preference = skew * torch.randn(32, generator=generator)
    scores = torch.sigmoid(preference + torch.randn(4096, 32, generator=generator))
    bias = torch.zeros(1, 32)
    for step in range(240):
        chosen = choose_experts(scores + bias[0], groups, limit, k)
        load = torch.bincount(chosen.flatten(), minlength=32).unsqueeze(0)
        if step == 0:
            assert max_violation(load) > 0.2
        update_bias(bias, load, 0.02 * 0.96 ** max(0, step - 90))
    assert max_violation(load) < 0.1


# -- losses ------------------------------------------------------------------------------------------------------------


def plain_loss(scores: np.ndarray, chosen: list[list[int]], k: int) -> float:
    """Σ_i f_i P_i of one run of tokens, straight from the report's equations 17 to 20."""
    T, E = scores.shape
    total = 0.0
    for i in range(E):
        f = E / (k * T) * sum(i in row for row in chosen)
        P = sum(scores[t, i] / scores[t].sum() for t in range(T)) / T
        total += f * P
    return total


@pytest.mark.parametrize("coefficients", [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_losses_and_their_gradient_against_the_plain_formula(coefficients: tuple[float, float]) -> None:
    """The gradient by central differences of the plain formula; the choices do not change under such small steps."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(12, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    experts = torch.rand(12, 8, generator=generator).argsort(dim=1)[:, :3]  # as biases or node limits may choose
    balance = Balance(*coefficients)
    loss = routing_loss(balance, scores / scores.sum(1, keepdim=True), experts, 2, 0.25)
    loss.backward()

    def plain(values: np.ndarray) -> float:
        best = np.argsort(-scores.detach().numpy(), axis=1)[:, :3].tolist()
        per_sequence = sum(plain_loss(values[i : i + 6], best[i : i + 6], 3) for i in (0, 6))
        return 0.25 * (coefficients[0] * per_sequence + coefficients[1] * 2 * plain_loss(values, experts.tolist(), 3))

    base = scores.detach().numpy().copy()
    assert loss.item() == pytest.approx(plain(base), rel=1e-12)
    for t, e in [(0, 0), (5, 3), (6, 7), (11, 2)]:
        up, down = base.copy(), base.copy()
        up[t, e] += 1e-5
        down[t, e] -= 1e-5
        assert scores.grad[t, e].item() == pytest.approx((plain(up) - plain(down)) / 2e-5, rel=1e-6, abs=1e-12)


def test_the_loss_is_one_when_balanced_and_experts_when_collapsed() -> None:
    even = torch.full((8, 4), 1 / 4)
    assert balance_loss(even, torch.arange(8).view(8, 1) % 4, 2).item() == pytest.approx(2.0)  # two rows
    collapsed = torch.zeros(8, 4)
    collapsed[:, 2] = 1
    assert balance_loss(collapsed, torch.full((8, 1), 2), 1).item() == pytest.approx(4.0)


def test_the_gradient_rides_on_the_gates() -> None:
    """Router weights get the token loss's gradient and the balance loss's, as if both had been added up at the end."""
    x, pull = tokens(12), torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = {}
    for balance in (Balance(), Balance(sequence_loss=0.4)):
        router = make_router(balance)
        (router(x, 2, 0.5).gates_TK * pull).sum().backward()
        grads[balance.sequence_loss] = router.linear.weight.grad
    weight = make_router().linear.weight.detach().requires_grad_()
    scores = torch.sigmoid(x @ weight.T)
    routing_loss(Balance(0.4), scores / scores.sum(1, keepdim=True), make_router()(x).experts_TK, 2, 0.5).backward()
    torch.testing.assert_close(grads[0.4], grads[0.0] + weight.grad)
    with torch.no_grad():
        assert not make_router(Balance(0.4))(x, 2, 0.5).gates_TK.requires_grad


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    """Two layers of four experts in two groups; two batches; the numbers of each layer and of the whole."""

    def counts(loads: list[list[int]], visits: list[list[int]], entropy: int, loss: int) -> Counts:
        rest = [[8, entropy, loss]] * 2
        return Counts(torch.tensor([a + b + c for a, b, c in zip(loads, visits, rest, strict=True)]), 4, 2)

    first = counts([[8, 0, 0, 0], [2, 2, 2, 2]], [[8, 0], [4, 4]], 8_000_000, 10**10)
    second = counts([[0, 8, 0, 0], [4, 2, 2, 0]], [[8, 0], [8, 4]], 4_000_000, 3 * 10**10)
    biases = torch.tensor([[0.25, -0.25, 0, 0], [0.5, 0.5, 0.5, 0.75]])
    metrics = summarise("balance", ["layers.1", "layers.2"], [first, second], first + second, biases)
    expected = {
        "max_vio": (3.0, 0.5, 3.0),
        "max_vio_global": (1.0, 0.5, 1.0),
        "entropy": (0.75, 0.75, 0.75),
        "bias_spread": (0.5, 0.25, 0.5),
        "dead_experts": (2, 0, 2),
        "nodes_per_token": (1.0, 1.25, 1.125),
        "loss": (0.02, 0.02, 0.04),
    }
    for name, (layer1, layer2, whole) in expected.items():
        assert metrics[f"balance/{name}/layers.1"] == pytest.approx(layer1), name
        assert metrics[f"balance/{name}/layers.2"] == pytest.approx(layer2), name
        assert metrics[f"balance/{name}"] == pytest.approx(whole), name
    assert len(metrics) == 3 * len(expected)


def test_heat_map_colours() -> None:
    around_mean = HeatMap(("a", "b"), [[0, 5, 10], [3, 3, 3]]).image(width=30, row_height=4)
    assert around_mean.shape == (8, 30, 3) and around_mean.dtype == np.uint8
    blue, white, red = around_mean[0, 0].tolist(), around_mean[0, 15].tolist(), around_mean[0, 29].tolist()
    assert blue[2] > blue[0] and white == [250, 250, 250] and red[0] > red[2]
    assert (around_mean[4:7] == 250).all(), "an even row is white"
    assert (around_mean[3] == 255).all(), "a line between the rows"
    signed = HeatMap(("a",), [[-2.0, 0.0, 2.0]], around_mean=False).image(width=3, row_height=2)[0].tolist()
    assert signed == [blue, white, red]
    assert HeatMap(("a",), [[0, 0]]).image().max() == 255  # no load at all: no division by zero
