"""The order of ranks, the table that shows it, and the warning when tokens take the slow links."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpipe.schedules import make_schedule
from parallel.mesh import EP_ACROSS_NODES, ORDERS, PP_ACROSS_NODES, Layout
from parallel.rank_table import crossing, numbers, rank_table


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.sampled_from(ORDERS))
def test_every_order_numbers_each_place_once(pp: int, ep: int, blocks: int, order: str) -> None:
    layout = Layout(pp * ep * blocks, pp, ep, order)
    places = [(layout.pp_of(r), layout.dp_of(r)) for r in range(layout.world)]
    assert len(set(places)) == layout.world
    assert all(layout.rank(*place) == rank for rank, place in enumerate(places))
    for groups, size in ((layout.pipelines(), pp), (layout.expert_groups(), ep)):
        assert Counter(r for g in groups for r in g) == Counter(range(layout.world))
        assert all(len(g) == size for g in groups)
    for group in layout.expert_groups():
        assert [layout.ep_of(r) for r in group] == list(range(ep))
        assert len({layout.pp_of(r) for r in group}) == 1
    for pipeline in layout.pipelines():
        assert [layout.pp_of(r) for r in pipeline] == list(range(pp))
        assert len({layout.dp_of(r) for r in pipeline}) == 1


@pytest.mark.parametrize(
    ("order", "ranks_per_node", "pp", "ep"),
    [
        (PP_ACROSS_NODES, 4, True, False),
        (EP_ACROSS_NODES, 4, False, True),
        (PP_ACROSS_NODES, 2, True, True),
        (EP_ACROSS_NODES, 8, False, True),
        (EP_ACROSS_NODES, 16, False, False),
    ],
)
def test_what_crosses_nodes(order: str, ranks_per_node: int, pp: bool, ep: bool) -> None:
    found = crossing(Layout(16, 4, 4, order), ranks_per_node)
    assert (found.pp, found.ep) == (pp, ep)
    assert (found.warning is not None) == (ep and not pp)


def test_neighbours_in_a_node() -> None:
    assert Layout(16, 4, 4, PP_ACROSS_NODES).dp_per_node(8) == 8
    assert Layout(16, 4, 4, EP_ACROSS_NODES).dp_per_node(8) == 2
    assert Layout(16, 4, 4, EP_ACROSS_NODES).dp_per_node(2) == 1


def test_the_table() -> None:
    schedule = make_schedule("dualpipe", 4, 8)
    assert rank_table(Layout(16, 4, 2), schedule, 4).splitlines() == [
        "node  ranks  pp  dp   ep   stages",
        "0     0–3    0   0–3  0–1  0,3",
        "1     4–7    1   0–3  0–1  1–2",
        "2     8–11   2   0–3  0–1  1–2",
        "3     12–15  3   0–3  0–1  0,3",
    ]
    other = rank_table(Layout(16, 4, 2, EP_ACROSS_NODES), schedule, 4).splitlines()
    assert other[1].split() == ["0", "0–3", "0–3", "0", "0", "0–3"]
    long = rank_table(Layout(2048, 16, 64), make_schedule("dualpipe", 16, 64), 8).splitlines()
    assert len(long) == 17
    assert long[-1] == "… and 241 more nodes"


def test_numbers() -> None:
    assert numbers([3, 1, 2, 8, 10, 9, 5]) == "1–3,5,8–10"
    assert numbers([]) == ""
