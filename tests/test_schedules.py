"""Every schedule: valid at all sizes it admits, refused in words at the others, and as good as published."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.costs import uniform
from dualpipe.schedule import Kind, Pair
from dualpipe.schedules import SCHEDULES, make_schedule, options_of
from dualpipe.simulator import simulate
from dualpipe.validate import validate


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 9), st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_every_size_is_generated_valid_or_refused(name: str, num_ranks: int, num_micro_batches: int) -> None:
    try:
        schedule = make_schedule(name, num_ranks, num_micro_batches)
    except ValueError as error:
        assert name not in ("gpipe", "zbv")  # these take every size
        assert "needs" in str(error)
        assert f"got {num_micro_batches}" in str(error) or f"got {num_ranks}" in str(error)
        return
    validate(schedule)
    assert schedule.num_ranks == num_ranks
    assert schedule.num_micro_batches == num_micro_batches


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 13))
@settings(deadline=None)
def test_interleaved_takes_any_number_of_chunks(num_ranks: int, chunks: int, more: int) -> None:
    schedule = make_schedule("interleaved_1f1b", num_ranks, num_ranks + more, chunks=chunks)
    validate(schedule)
    assert schedule.num_stages == chunks * num_ranks
    assert all(len(schedule.stages_of(rank)) == chunks for rank in range(num_ranks))


def test_one_chunk_is_plain_1f1b() -> None:
    # Megatron's warm-up is deeper than 1F1B needs, so only the work is the same, not the memory.
    interleaved, plain = make_schedule("interleaved_1f1b", 4, 8, chunks=1), make_schedule("one_f_one_b", 4, 8)
    assert simulate(interleaved, uniform(4)).makespan == simulate(plain, uniform(4)).makespan


@pytest.mark.parametrize(
    ("name", "sizes", "options", "message"),
    [
        ("nonsense", (4, 8), {}, "unknown schedule 'nonsense'; choose one of dualpipe, "),
        ("dualpipe", (4, 8), {"chunks": 2}, "dualpipe has no option 'chunks'; it has: none"),
        ("interleaved_1f1b", (4, 8), {"chunk": 2}, "it has: chunks"),
        ("interleaved_1f1b", (4, 8), {"chunks": 0}, "got chunks=0"),
        ("dualpipe", (3, 12), {}, "even number of ranks; got 3"),
        ("dualpipe", (4, 9), {}, "even number of micro-batches, at least 8; got 9"),
        ("dualpipev", (4, 7), {}, "at least 8 micro-batches; got 7"),
        ("one_f_one_b", (4, 3), {}, "at least 4 micro-batches; got 3"),
        ("zb1p", (0, 3), {}, "got 3"),
        ("gpipe", (0, 0), {}, "got 0 and 0"),
    ],
)
def test_what_cannot_be_made_is_refused(
    name: str, sizes: tuple[int, int], options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        make_schedule(name, *sizes, **options)
    assert message in str(caught.value)


def test_options_are_listed() -> None:
    assert options_of("interleaved_1f1b") == {"chunks": 2}
    assert options_of("dualpipe") == {}


# -- as published, at F = 1, B = 2, W = 1, F&B = 3 ---------------------------------------------------------------


@pytest.mark.parametrize("stages", range(2, 33, 2))
@pytest.mark.parametrize("more", [0, 4])
def test_the_table_of_the_dualpipe_report(stages: int, more: int) -> None:
    """Every rank's idle time and the activation peak, for all four rows (FACTS.md)."""
    table = {  # name: (ranks, idle, activations)
        "one_f_one_b": (stages, (stages - 1) * 3, stages),
        "zb1p": (stages, (stages - 1) * (3 - 2), stages),
        "dualpipe": (stages, (stages // 2 - 1) * (3 + 2 - 3), stages + 1),
        "dualpipev": (stages // 2, (stages // 2 - 1) * (3 + 2 - 3), stages + 1),
    }
    num_micro_batches = 2 * stages + more
    for name, (ranks, idle, activations) in table.items():
        timeline = simulate(make_schedule(name, ranks, num_micro_batches), uniform(stages))
        stages_per_rank = stages // ranks
        assert timeline.idle == (idle,) * ranks, name
        assert timeline.makespan == 3 * num_micro_batches * stages_per_rank + idle
        assert max(timeline.peak_activations) == activations


def test_dualpipe_pp8_m20_takes_66() -> None:
    timeline = simulate(make_schedule("dualpipe", 8, 20), uniform(8))
    assert timeline.makespan == 66
    assert timeline.idle == (6,) * 8
    assert timeline.peak_activations == (9,) * 8


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_interleaving_divides_the_bubble_by_the_chunks(num_ranks: int) -> None:
    for chunks in (1, 2, 3):
        timeline = simulate(
            make_schedule("interleaved_1f1b", num_ranks, 4 * num_ranks, chunks=chunks),
            uniform(num_ranks).split(chunks),
        )
        assert timeline.idle == pytest.approx(((num_ranks - 1) * 3 / chunks,) * num_ranks)
        assert timeline.peak_activations == tuple(
            2 * (num_ranks - 1 - rank) + (chunks - 1) * num_ranks + 1 for rank in range(num_ranks)
        )


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8, 16])
def test_zbv_waits_only_for_the_first_micro_batch_and_needs_the_memory_of_1f1b(num_ranks: int) -> None:
    timeline = simulate(make_schedule("zbv", num_ranks, 2 * num_ranks + 3), uniform(2 * num_ranks))
    assert timeline.idle == (num_ranks - 1,) * num_ranks
    assert timeline.peak_activations == (2 * num_ranks,) * num_ranks


def test_gpipe_keeps_every_activation() -> None:
    timeline = simulate(make_schedule("gpipe", 4, 12), uniform(4))
    assert timeline.peak_activations == (12,) * 4
    assert timeline.idle == (9,) * 4


def test_dualpipe_overlaps_on_one_rank_too() -> None:
    (row,) = make_schedule("dualpipe", 1, 6).steps
    assert [type(step) is Pair for step in row] == [False, True, True, True, True, True, False]


def test_dualpipev_is_dualpipe_seen_by_half_its_ranks() -> None:
    half, whole = make_schedule("dualpipev", 4, 10), make_schedule("dualpipe", 8, 20)
    lower = simulate(half, uniform(8)).computing
    upper = simulate(whole, uniform(8)).computing[:4]
    assert [[(s.start, s.end) for s in row] for row in lower] == [[(s.start, s.end) for s in row] for row in upper]


def test_every_w_follows_its_i_where_the_backward_is_split() -> None:
    for name in ("dualpipe", "dualpipev", "zb1p", "zbv"):
        kinds = {a.kind for rank in range(4) for a in make_schedule(name, 4, 12).actions(rank)}
        assert {Kind.I, Kind.W} <= kinds
