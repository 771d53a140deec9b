"""Copies of experts: tokens are shared evenly, swaps lose no expert, and a row's bits do not depend on its tile."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualpipe.wgrad import WeightGradQueue
from model.layers import Toolbox
from model.precisions import make_precision
from parallel.copies import CopyTable, Slots, occurrences
from parallel.dispatch import RoutedDispatcher
from parallel.placement import Plan
from serving.expert_plan import ExpertSettings, Loads, first_slots, imbalance, next_slots
from serving.hosted_experts import HEIGHTS, HostedExperts, SlotWeights, agreeing_heights, tiles
from serving.swaps import arrange, swaps


def rank_loads(table: CopyTable, experts_TK: Tensor, senders: int) -> Tensor:
    """Rows of each rank when every sender has the same tokens."""
    slots = torch.cat([table.spread(experts_TK, first).flatten() for first in range(senders)])
    return torch.bincount(slots // table.per_rank, minlength=len(table.slots))


def test_a_hot_expert_is_shared_by_its_copies() -> None:
    table = CopyTable.of(((0, 1, 2), (0, 3, 4), (0, 5, 6)), 7)
    experts_TK = torch.tensor([[0, 1], [0, 3], [0, 5], [0, 2], [0, 4], [0, 6]])
    assert rank_loads(table, experts_TK, 1).tolist() == [4, 4, 4]
    one = torch.tensor([[0]])
    assert [int(table.spread(one, first)) // 3 for first in range(3)] == [0, 1, 2]  # every sender begins elsewhere


@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), max_size=30))
def test_occurrences_count_what_came_before(rows: list[list[int]]) -> None:
    seen: Counter[int] = Counter()
    expected = []
    for expert in (e for row in rows for e in row):
        expected.append(seen[expert])
        seen[expert] += 1
    assert occurrences(torch.tensor(rows, dtype=torch.int64).view(-1, 2)).flatten().tolist() == expected


def placements() -> st.SearchStrategy[tuple[int, Slots, Slots]]:
    """Experts, and two placements of them on the same ranks and slots."""

    @st.composite
    def draw(draw: st.DrawFn) -> tuple[int, Slots, Slots]:
        ranks, per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 5))
        experts = draw(st.integers(1, ranks * per_rank))
        more = st.lists(st.integers(0, experts - 1), min_size=ranks * per_rank - experts,
                        max_size=ranks * per_rank - experts)  # fmt: skip
        made = []
        for _ in range(2):
            order = draw(st.permutations([*range(experts), *draw(more)]))
            made.append(tuple(tuple(order[r * per_rank : (r + 1) * per_rank]) for r in range(ranks)))
        return experts, made[0], made[1]

    return draw()


@settings(max_examples=300, deadline=None)
@given(placements())
def test_swaps_lead_to_the_new_placement_and_lose_no_expert(case: tuple[int, Slots, Slots]) -> None:
    experts, current, wanted = case
    wanted = arrange(current, wanted)
    state = [list(rank) for rank in current]
    writes = 0
    for swap in swaps(current, wanted):
        assert all(w.expert in state[w.source] for w in swap)  # the source has it when the swap begins
        for w in swap:
            state[w.rank][w.slot] = w.expert
        writes += len(swap)
        assert {e for rank in state for e in rank} == set(range(experts))
    assert tuple(map(tuple, state)) == wanted
    differing = sum(a != b for r, s in zip(current, wanted, strict=True) for a, b in zip(r, s, strict=True))
    assert writes == differing


def test_what_is_in_place_stays_there() -> None:
    assert arrange(((3, 1, 0), (2, 4, 5)), [(0, 3, 5), (1, 2, 4)]) == ((3, 5, 0), (2, 4, 1))


@settings(max_examples=200, deadline=None)
@given(placements(), st.data())
def test_narrowing_keeps_every_expert_and_the_limit_where_it_can(
    case: tuple[int, Slots, Slots], data: st.DataObject
) -> None:
    experts, slots, _ = case
    load = data.draw(st.lists(st.integers(0, 50), min_size=experts, max_size=experts))
    table = CopyTable.of(slots, experts)
    most = table.per_rank
    narrow = table.narrowed(load, most)
    used = [row[:count] for row, count in zip(narrow.slots_EC.tolist(), narrow.copies_E.tolist(), strict=True)]
    held = [e for rank in slots for e in rank]
    for expert, found in enumerate(used):
        assert found
        assert len(set(found)) == len(found)
        assert all(held[slot] == expert for slot in found)


def test_narrowing_uses_few_experts_and_relieves_the_heaviest_rank() -> None:
    slots = ((0, 1, 2, 3), (0, 1, 4, 5), (0, 2, 4, 3))
    table = CopyTable.of(slots, 6)
    load = [90, 6, 6, 6, 6, 6]
    narrow = table.narrowed(load, 3)
    on_rank = Counter(slot // 4 for row, n in zip(narrow.slots_EC.tolist(), narrow.copies_E.tolist(), strict=True)
                      for slot in row[:n])  # fmt: skip
    assert max(on_rank.values()) <= 3
    assert int(narrow.copies_E[0]) == 3
    assert table.narrowed([0, 6, 0, 0, 0, 0], 3).copies_E[1] == 2  # shared, as that relieves


@pytest.mark.parametrize("slots", [((0, 1), (2,)), ((0, 1), (1, 3))])
def test_tables_that_cannot_be(slots: Slots) -> None:
    with pytest.raises(ValueError, match=r"equally many slots|are on no rank"):
        CopyTable.of(slots, 4)


# -- the same bits wherever a row is computed ------------------------------------------------------------------------


def hosted(precision: str, hidden: int, ffn: int, copies: int) -> HostedExperts:
    """The same expert in all slots, in memory of their own."""
    seam, dtype = make_precision(precision)
    tools = Toolbox(seam, WeightGradQueue(), RoutedDispatcher(None, 1), dtype)
    slots = []
    for _ in range(copies):
        weights = SlotWeights(hidden, ffn, seam.dtype, "cpu")
        generator = torch.Generator().manual_seed(1)
        for parameter in weights.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / hidden**0.5)
        slots.append(weights)
    experts = HostedExperts(slots, tools, HEIGHTS[:1])
    experts.heights = agreeing_heights(lambda x, g: experts.tile(0, x, g), hidden, seam.dtype, "cpu")
    return experts


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64", "fp8"])
@pytest.mark.parametrize(("hidden", "ffn"), [(48, 24), (256, 128), (384, 512)])
def test_a_row_has_the_same_bits_whichever_copy_and_neighbours_it_meets(precision: str, hidden: int, ffn: int) -> None:
    experts = hosted(precision, hidden, ffn, copies=3)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(41, hidden, generator=generator).to(make_precision(precision)[0].dtype)
    gates = torch.rand(41, generator=generator)
    wanted = experts(x, gates, [41, 0, 0])
    assert float(wanted.abs().max()) > 0
    for counts in ([0, 0, 41], [1, 39, 1], [13, 14, 14], [2, 5, 34]):
        order = torch.randperm(41, generator=generator)
        assert torch.equal(experts(x[order], gates[order], counts), wanted[order])


def test_tiles_cover_the_rows() -> None:
    assert tiles(41, (4, 16, 32)) == [32, 4, 4, 4]
    assert tiles(1, (16, 64)) == [16]
    assert tiles(200, (128,)) == [128, 128]


def test_heights_in_which_a_row_changes_are_not_used() -> None:
    """Libraries that add up otherwise above some height, and one that never agrees with itself."""

    def other_above(height: int) -> tuple[int, ...]:
        def tile(x: Tensor, gates: Tensor) -> Tensor:
            return (x * 1.0000001 if len(x) > height else x) * gates.unsqueeze(1)

        return agreeing_heights(tile, 16, torch.float32, "cpu")

    assert other_above(1000) == HEIGHTS
    assert other_above(8) == (16, 32, 64, 128)  # the tall ones are many rows at once, so they are preferred

    def by_place(x: Tensor, gates: Tensor) -> Tensor:
        return x + torch.arange(len(x)).unsqueeze(1)

    assert agreeing_heights(by_place, 16, torch.float32, "cpu") == (1,)


# -- loads and plans -------------------------------------------------------------------------------------------------


def test_the_moving_average_forgets_and_ignores_what_was_not_measured() -> None:
    loads = Loads(layers=2, experts=2, memory=0.5)
    loads.add(torch.tensor([[8, 0], [0, 0]]))
    loads.add(torch.tensor([[0, 4], [6, 2]]))
    loads.add(torch.tensor([[0, 0], [0, 0]]))
    assert loads.average.tolist() == [[4, 2], [6, 2]]


def test_a_skewed_load_is_placed_evenly_and_a_good_placement_stays() -> None:
    options = ExpertSettings(redundant=2)
    start = first_slots(np.zeros(6), [(), ()], 1, options)
    assert all(len(rank) == 4 for rank in start)
    load = np.array([60.0, 10, 10, 10, 10, 10])
    better = next_slots(load, start, 1, options)
    plan = Plan(tuple(tuple(sorted(rank)) for rank in better))
    assert plan.imbalance(load) < 1.1
    assert next_slots(load, better, 1, options) == better


def test_survivors_keep_what_they_hold() -> None:
    """Six experts on three ranks; the middle one is lost."""
    after = first_slots(np.ones(6), [(0, 1), (4, 5)], 1, ExpertSettings())
    assert {0, 1} <= set(after[0])
    assert {4, 5} <= set(after[1])
    assert sorted(e for rank in after for e in rank) == list(range(6))


def test_the_hierarchical_policy_keeps_groups_within_nodes() -> None:
    options = ExpertSettings(redundant=4, policy="hierarchical", ranks_per_node=2)
    load = np.array([50.0, 1, 1, 1, 20, 1, 1, 1])
    first = first_slots(np.zeros(8), [()] * 4, 4, options)
    for slots in (first, next_slots(load, first, 4, options), first_slots(load, first, 4, options)):
        nodes = [set(slots[0] + slots[1]), set(slots[2] + slots[3])]
        for group in range(4):
            assert sum(bool({2 * group, 2 * group + 1} & node) for node in nodes) == 1


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 6), st.data())
def test_whatever_is_held_every_expert_gets_a_slot(ranks: int, experts: int, more: int, data: st.DataObject) -> None:
    options = ExpertSettings(redundant=more)
    held = data.draw(st.lists(st.lists(st.integers(0, experts - 1), max_size=options.slots(experts, ranks)),
                              min_size=ranks, max_size=ranks))  # fmt: skip
    load = np.array(data.draw(st.lists(st.integers(0, 9), min_size=experts, max_size=experts)), dtype=float)
    slots = first_slots(load, held, 1, options)
    assert {e for rank in slots for e in rank} == set(range(experts))
    assert {len(rank) for rank in slots} == {options.slots(experts, ranks)}


def test_without_loads_experts_are_in_order() -> None:
    assert first_slots(np.zeros(6), [()] * 3, 1, ExpertSettings()) == ((0, 1), (2, 3), (4, 5))
    assert first_slots(np.zeros(5), [()] * 2, 1, ExpertSettings(redundant=2)) == ((0, 1, 2, 3), (3, 4, 0, 1))


def test_imbalance_of_nothing_is_one() -> None:
    assert imbalance([0, 0]) == 1
    assert imbalance([3, 1]) == 1.5
