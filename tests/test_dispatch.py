"""Tokens reach their experts and their sums come home, by every backend and whatever the routing; and bit-equal twice.

The oracle adds, for each token, gate × expert(token) over all its experts, with experts that only scale.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.dispatch import RoutedDispatcher
from parallel.expert_groups import create_expert_groups, split_nodes
from parallel.packing import Columns
from parallel.routes import Place, Sizes, count_table
from tests.spawn import run_ranks

D, SHARE, K = 6, 2, 3
TIMEOUT = timedelta(seconds=60)


def routing(kind: str, rank: int, world: int) -> Tensor:
    """experts_TK of one rank."""
    E = SHARE * world
    generator = torch.Generator().manual_seed(rank)
    scores = torch.rand(7 + rank, E, generator=generator)
    if kind == "all to one":  # one token has one expert: K is 1
        return torch.full((5, 1), E - 1)
    if kind == "one rank gets none":
        scores[:, :SHARE] = -1
    if kind == "an empty rank" and rank == 0:
        scores = scores[:0]
    if kind == "nobody":
        scores = scores[:0]
    return scores.argsort(1, descending=True)[:, : min(K, E - SHARE)]


KINDS = ("random", "all to one", "one rank gets none", "an empty rank", "nobody")


def expert_scale(expert: int) -> float:
    return 1.0 + expert


def round_trip(dispatcher: Any, experts_TK: Tensor, x: Tensor, gates: Tensor, first: int) -> list[Tensor]:
    """y, dx and dgates of Σ y·dy with dy = x, through the segments' operations."""
    exchange = dispatcher.open()
    (table,) = exchange.counts.start(experts_TK).wait()
    rows, row_gates, counts = exchange.dispatch.start(x, gates, experts_TK, table).wait()
    scale = torch.tensor([expert_scale(first + e) for e, n in enumerate(counts) for _ in range(n)], dtype=x.dtype)
    assert len(scale) == len(rows)
    weights = (row_gates * scale).to(x.dtype).unsqueeze(1)
    (y,) = exchange.combine.start(rows * weights).wait()
    (dweighted,) = exchange.combine.start_backward(x).wait()
    dgates = ((dweighted * rows).sum(1) * scale).to(gates.dtype)
    dx, dgates_home, *_ = exchange.dispatch.start_backward(dweighted * weights, dgates, None).wait()
    return [y, dx, dgates_home]


def oracle(experts_TK: Tensor, x: Tensor, gates: Tensor) -> list[Tensor]:
    scale = 1.0 + experts_TK.to(x.dtype)
    x_leaf, gates_leaf = x.clone().requires_grad_(), gates.clone().requires_grad_()
    y = x_leaf * (gates_leaf * scale).sum(1, keepdim=True)
    return [y.detach(), *torch.autograd.grad((y * x).sum(), (x_leaf, gates_leaf))]


def check(rank: int, world: int, per_node: int | None) -> int:
    groups = create_expert_groups([list(range(world))], TIMEOUT, per_node)
    dispatcher = RoutedDispatcher(groups, SHARE)
    for kind in KINDS:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            experts_TK = routing(kind, rank, world)
            generator = torch.Generator().manual_seed(100 + rank)
            x = torch.randn(len(experts_TK), D, generator=generator).to(dtype)
            gates = torch.rand(experts_TK.shape, generator=generator).to(torch.promote_types(dtype, torch.float32))
            found = round_trip(dispatcher, experts_TK, x, gates, rank * SHARE)
            again = round_trip(dispatcher, experts_TK, x, gates, rank * SHARE)
            limit = 3e-2 if dtype is torch.bfloat16 else 1e-5
            for ours, twice, theirs in zip(found, again, oracle(experts_TK, x.double(), gates.double()), strict=True):
                assert torch.equal(ours, twice)
                assert ours.shape == theirs.shape
                assert torch.allclose(ours.double(), theirs, rtol=limit, atol=limit), (kind, dtype)
    return len(KINDS)


@pytest.mark.parametrize(("world", "per_node"), [(1, None), (2, None), (3, None), (2, 1), (2, 2), (4, 2), (4, 4)])
def test_every_token_comes_home_with_the_sum_of_its_experts(world: int, per_node: int | None) -> None:
    assert run_ranks(world, check, per_node) == [len(KINDS)] * world


def test_a_node_is_reached_once_however_many_of_its_ranks_are_needed() -> None:
    """Hierarchical: rows that cross to another node = (token, node) pairs; all-to-all: (token, rank) pairs."""
    experts_TK = torch.tensor([[0, 1, 4, 7], [2, 3, 4, 6], [4, 5, 6, 7]])  # 8 experts, 2 nodes × 2 ranks × 2
    place = Place(0, nodes=2, local=2, share=2)
    table = count_table(experts_TK, place).tolist()
    sizes = Sizes.read(table, [[0] * 5] * 4, place)
    assert sizes.sent[0] == [2, 3]
    flat = Place(0, nodes=4, local=1, share=2)
    table = count_table(experts_TK, flat).tolist()
    assert Sizes.read(table, [[0] * 4] * 4, flat).sent[0] == [1, 1, 3, 3]


def test_nodes_must_divide_the_expert_group_or_hold_it() -> None:
    assert split_nodes(8, 4) == (2, 4)
    assert split_nodes(4, 8) == (1, 4)
    with pytest.raises(ValueError, match=r"parallel.ep=6 and parallel.ranks_per_node=4"):
        split_nodes(6, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_columns_come_out_of_a_block_as_they_went_in(rows: int, dtype: torch.dtype) -> None:
    columns = (
        torch.rand(rows, 3).to(dtype),
        torch.rand(rows, 2),
        torch.arange(rows * 3, dtype=torch.int32).view(-1, 3),
    )
    layout = Columns.of(columns)
    for before, after in zip(columns, layout.unpack(layout.pack(columns)), strict=True):
        assert torch.equal(before, after)
