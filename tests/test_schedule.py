"""The text form, the CSV reader, and the validator: what is accepted, and what is refused with which words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.csvio import read_csv
from dualpipe.schedule import Action, Kind, Pair, Schedule, Step, parse_step, parts
from dualpipe.schedules import SCHEDULES, make_schedule
from dualpipe.validate import InvalidScheduleError, validate

actions = st.builds(Action, st.sampled_from(Kind), st.integers(0, 99), st.integers(0, 99))
pairs = st.builds(
    Pair,
    st.builds(Action, st.just(Kind.F), st.integers(0, 9), st.integers(0, 9)),
    st.builds(Action, st.just(Kind.B), st.integers(0, 9), st.integers(0, 9)),
)


@given(st.one_of(actions, pairs))
def test_a_step_is_read_as_written(step: Step) -> None:
    assert parse_step(str(step)) == step


@pytest.mark.parametrize(
    "text", ["", "F", "0F", "F0", "0X1", "-1F0", "0F0 ", "(0F0)", "(0B0;0F0)OVERLAP_F_B", "(0F0;0B1)"]
)
def test_other_text_is_not_a_step(text: str) -> None:
    with pytest.raises(ValueError, match=r"write e\.g\."):
        parse_step(text)


# -- CSV ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_csv_gives_back_the_schedule(name: str, num_ranks: int) -> None:
    schedule = make_schedule(name, num_ranks, 8)
    read = read_csv(schedule.to_csv(), name)
    assert read.steps == schedule.steps
    assert read.num_micro_batches == schedule.num_micro_batches
    # On one rank the two directions of DualPipe hold the same stage: nothing tells them apart, or needs to.
    assert read.placement == schedule.placement[: 1 if num_ranks == 1 else None]


@pytest.mark.parametrize("name", SCHEDULES)
def test_pytorch_reads_our_csv(name: str) -> None:
    torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    schedule = make_schedule(name, 4, 8)
    for line, row in zip(schedule.to_csv().splitlines(), schedule.steps, strict=True):
        theirs = [torch_schedules._Action.from_str(cell) for cell in line.split(",")]
        assert [str(action) for action in theirs] == [str(step) for step in row]


def test_we_read_pytorchs_csv_with_communication() -> None:
    lowered = "0UNSHARD,0F0,0SEND_F0,0F1,0SEND_F1,,0RECV_B0,0B0,0RECV_B1,0B1,0REDUCE_GRAD\n"
    lowered += "1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1,1B1,1SEND_B1,1RESHARD\n"
    schedule = read_csv(lowered)
    validate(schedule)
    assert schedule.to_csv() == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no action found"),
        ("hello", "row 1, cell 1: 'hello' is not an action"),
        ("0F0,0F1\n0B0,x", "row 2, cell 2: 'x' is not an action"),
        ("(0F0;0F1)OVERLAP_F_B", "is not a pair"),
        ("0F0,0B0\n2F0,2B0", "stage 1 has no action"),
        ("0F0\n0B0", "stage 0 of micro-batch 0 stands on rank 0 and on rank 1"),
        ("0F99999999999,0B99999999999", "a number above"),
        ("0F0,0B0,0F2,0B2\n0F1,0B1", "cannot share 3 micro-batches"),
        ("0F0,0B0,0F2,0B2\n0F1,0B1,0F3,0B3", "stage 0 stands on ranks 0, 1; allowed is one rank, or one for"),
        ("0F0,0B0,1F0,1B0\n0F1,0B1", "stage 1 has no action for micro-batches 1..1"),
        ("0F" + "9" * 5000, "is not an action"),
        ("٠F٠", "is not an action"),
    ],
)
def test_a_malformed_csv_gives_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_csv(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


cells = st.one_of(
    st.builds(str, st.one_of(actions, pairs)),
    st.text(alphabet="0123456789FBIW();_OVERLAP SEND\t\x0b\u0660", max_size=8),
    st.text(max_size=6),
)
tables = st.lists(st.lists(cells, max_size=6).map(",".join), max_size=5).map("\n".join)


@given(st.one_of(tables, st.text()))
@settings(max_examples=300)
def test_fuzz_csv_reads_or_explains(text: str) -> None:
    try:
        validate(read_csv(text))
    except ValueError as error:
        assert str(error)
        assert len(str(error).splitlines()) == 1


@given(st.sampled_from(sorted(SCHEDULES)), st.data())
def test_fuzz_one_damaged_cell_reads_or_explains(name: str, data: st.DataObject) -> None:
    rows = [line.split(",") for line in make_schedule(name, 2, 4).to_csv().splitlines()]
    row = data.draw(st.sampled_from(rows))
    row[data.draw(st.integers(0, len(row) - 1))] = data.draw(cells)
    try:
        validate(read_csv("\n".join(map(",".join, rows))))
    except ValueError as error:
        assert len(str(error).splitlines()) == 1


# -- validator ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 16).map(lambda half: 2 * half), st.integers(0, 12).map(lambda more: 2 * more))
@settings(max_examples=40, deadline=None)
def test_dualpipe_is_valid_for_every_even_number_of_ranks(num_ranks: int, more: int) -> None:
    validate(make_schedule("dualpipe", num_ranks, 2 * num_ranks + more))


@pytest.mark.parametrize("num_ranks", range(2, 33, 2))
def test_dualpipe_is_valid_at_the_fewest_micro_batches(num_ranks: int) -> None:
    validate(make_schedule("dualpipe", num_ranks, 2 * num_ranks))


def with_row(schedule: Schedule, rank: int, row: tuple[Step, ...]) -> Schedule:
    return dataclasses.replace(schedule, steps=(*schedule.steps[:rank], row, *schedule.steps[rank + 1 :]))


def removed(schedule: Schedule, rank: int, index: int) -> Schedule:
    row = schedule.steps[rank]
    return with_row(schedule, rank, row[:index] + row[index + 1 :])


def doubled(schedule: Schedule, rank: int, index: int) -> Schedule:
    row = schedule.steps[rank]
    return with_row(schedule, rank, row[: index + 1] + row[index:])


def misplaced(schedule: Schedule, rank: int, index: int) -> Schedule:
    other = (rank + 1) % schedule.num_ranks
    moved = schedule.steps[rank][index]
    return with_row(removed(schedule, rank, index), other, (*schedule.steps[other], moved))


places = st.tuples(st.sampled_from(sorted(SCHEDULES)), st.sampled_from([2, 4]), st.data())


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (removed, r"is missing|must be one B, or one I and one W"),
        (doubled, r"stands 2 times"),
        (misplaced, r"belongs on rank"),
    ],
)
@given(place=places)
@settings(deadline=None)
def test_a_mutated_schedule_is_refused(
    mutate: Callable[[Schedule, int, int], Schedule], message: str, place: tuple[str, int, st.DataObject]
) -> None:
    name, num_ranks, data = place
    schedule = make_schedule(name, num_ranks, 8)
    rank = data.draw(st.integers(0, num_ranks - 1))
    index = data.draw(st.integers(0, len(schedule.steps[rank]) - 1))
    with pytest.raises(InvalidScheduleError, match=message):
        validate(mutate(schedule, rank, index))


@given(place=places)
@settings(deadline=None)
def test_steps_swapped_across_a_dependency_are_refused(place: tuple[str, int, st.DataObject]) -> None:
    name, num_ranks, data = place
    schedule = make_schedule(name, num_ranks, 8)
    rank = data.draw(st.integers(0, num_ranks - 1))
    where = {a: k for k, step in enumerate(schedule.steps[rank]) for a in parts(step)}
    backward = data.draw(st.sampled_from([a for a in where if a.kind is not Kind.F]))
    first = where[Action(Kind.F, backward.stage, backward.micro_batch)]
    row = list(schedule.steps[rank])
    row[first], row[where[backward]] = row[where[backward]], row[first]
    with pytest.raises(InvalidScheduleError, match=r"deadlock: .*waits at .* for "):
        validate(with_row(schedule, rank, tuple(row)))


def test_ranks_that_wait_for_each_other_are_refused() -> None:
    rows = ((Action(Kind.F, 1, 1), Action(Kind.F, 0, 0)), (Action(Kind.F, 1, 0), Action(Kind.F, 0, 1)))
    crossed = Schedule("crossed", 2, ((0, 1), (1, 0)), rows)
    with pytest.raises(InvalidScheduleError, match="rank 0 waits at 1F1 for 0F1; rank 1 waits at 1F0 for 0F0"):
        validate(crossed, forward_only=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"placement": ()}, "no ranks or no stages"),
        ({"placement": ((0, 5),)}, "does not fit 2 ranks"),
        ({"num_micro_batches": 0}, "need at least 1"),
        ({"num_micro_batches": 1}, "names a micro-batch outside 0..0"),
        ({"placement": ((0, 1), (1, 0)), "num_micro_batches": 3}, "cannot be shared equally by 2 directions"),
        ({"placement": ((0,),)}, "names a stage outside 0..0"),
    ],
)
def test_a_bad_shape_is_refused(change: dict[str, object], message: str) -> None:
    schedule = dataclasses.replace(make_schedule("one_f_one_b", 2, 2), **change)
    with pytest.raises(InvalidScheduleError, match=message):
        validate(schedule)


def test_forward_only_keeps_all_forwards_and_nothing_else() -> None:
    for name in SCHEDULES:
        schedule = make_schedule(name, 4, 8).forward_only()
        validate(schedule, forward_only=True)
        with pytest.raises(InvalidScheduleError, match="backward must be one B"):
            validate(schedule)
