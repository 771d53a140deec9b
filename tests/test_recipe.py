"""Schedules in tokens: values at and between the borders, and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.recipe import Piece, check_pieces, value_at

REPORT_LR = [
    Piece(30e9, 0, 2.2e-4),
    Piece(10e12, 2.2e-4),
    Piece(4.3e12, 2.2e-4, 2.2e-5, "cosine"),
    Piece(333e9, 2.2e-5),
    Piece(start=7.3e-6),
]


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (0, 0.0),
        (15e9, 1.1e-4),
        (30e9, 2.2e-4),
        (10e12, 2.2e-4),
        (10.03e12, 2.2e-4),
        (10.03e12 + 4.3e12 / 4, 2.2e-5 + 1.98e-4 * 0.5 * (1 + math.sqrt(0.5))),
        (10.03e12 + 2.15e12, 1.21e-4),
        (14.33e12, 2.2e-5),
        (14.662e12, 2.2e-5),
        (14.663e12, 7.3e-6),
        (1e15, 7.3e-6),
    ],
)
def test_the_reports_learning_rate(tokens: float, value: float) -> None:
    assert value_at(REPORT_LR, tokens) == pytest.approx(value, rel=1e-9)
    check_pieces("optim.schedule", REPORT_LR)


def test_the_last_value_stays() -> None:
    assert value_at([Piece(10, 1.0, 0.25)], 1000) == 0.25
    assert value_at([Piece(10, 1.0), Piece(0.5, 0.0)], 10) == 0.0


@given(
    st.lists(st.tuples(st.floats(1, 100), st.floats(0, 9), st.floats(0, 9), st.sampled_from(("linear", "cosine")))),
    st.floats(0, 1000),
)
def test_values_stay_between_the_ends_of_their_piece(made: list, tokens: float) -> None:
    pieces = [Piece(length, start, end, shape) for length, start, end, shape in made] or [Piece(start=3.0)]
    ends = [v for p in pieces for v in (p.start, p.start if p.end is None else p.end)]
    assert min(ends) - 1e-9 <= value_at(pieces, tokens) <= max(ends) + 1e-9


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([Piece(0)], r"x\[0\]\.tokens=0 must be positive"),
        ([Piece(math.nan)], r"x\[0\]\.tokens=nan must be positive"),
        ([Piece(1, shape="step")], "shape='step' is unknown; choose one of linear, cosine"),
        ([Piece(), Piece()], r"x\[0\]\.tokens is infinite"),
        ([Piece(start=0, end=1)], "has an end and no length"),
        ([Piece(1, -1)], r"x\[0\]\.start=-1 must be 0.0 or more"),
        ([Piece(1, 0, math.nan)], r"x\[0\]\.end=nan must be"),
    ],
)
def test_what_is_refused(pieces: list[Piece], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pieces("x", pieces)


def test_an_empty_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one piece"):
        value_at([], 0)
