"""The order of a pair's pieces is the report's Fig. 4, hides what it can, and breaks no dependency, for any layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dualpipe.__main__ import main
from dualpipe.outline import Outlines
from dualpipe.overlap import (
    Paired,
    Piece,
    Side,
    backward_order,
    forward_order,
    pair_order,
    two_lanes,
    weight_order,
)
from dualpipe.pair import pair_timeline
from dualpipe.pair import stage_segments as stage
from dualpipe.schedule import Kind
from dualpipe.stage import Lane, Segment

# Report Fig. 4, read from left to right; one period of the steady state, which begins with the backward's combine.
FIGURE_4_COMPUTE = ["ATTN(F)△", "MLP(B)▲", "MLP(W)▲", "MLP(F)△", "ATTN(B)▲", "ATTN(W)▲"]
FIGURE_4_COMMUNICATION = ["COMBINE(B)▲", "DISPATCH(F)△", "DISPATCH(B)▲", "COMBINE(F)△"]


def figure_names(order: Sequence[Paired], lane: Lane) -> list[str]:
    """In the words of Fig. 4: the backward for inputs is B there; counts and the sum at a stage's end are not shown."""
    words = {"attention": "ATTN", "experts": "MLP", "shared": "MLP", "dispatch": "DISPATCH", "combine": "COMBINE"}
    found = []
    for side, piece in order:
        word = words.get(piece.name.split(".")[-1], "P2P" if piece.is_message else "")
        if piece.lane is lane and word:
            part = "B" if piece.part is Kind.I else piece.part.value
            found.append(f"{word}({part}){'▲' if side is Side.BACKWARD else '△'}" if word != "P2P" else "P2P")
    return found


def names(order: Sequence[Piece]) -> list[str]:
    return [str(piece) for piece in order]


def test_a_pair_of_moe_layers_runs_in_the_order_of_figure_4() -> None:
    order = pair_order(stage("mmm"), stage("mmm"))
    assert figure_names(order, Lane.COMPUTE) == FIGURE_4_COMPUTE * 3
    assert figure_names(order, Lane.COMM) == [*FIGURE_4_COMMUNICATION * 3, "P2P", "P2P"]


def test_each_communication_of_figure_4_has_the_other_chunks_compute_under_it() -> None:
    order = pair_order(stage("mm"), stage("mm"))
    text = [f"{piece}{'▲' if side is Side.BACKWARD else '△'}" for side, piece in order]
    assert text == [
        "output(I)▲", "1.combine(I)▲", "output(W)▲",
        "0.attention(F)△", "0.counts(F)△", "0.router(F)△", "0.dispatch(F)△",
        "1.experts(I)▲", "1.dispatch(I)▲", "1.experts(W)▲",
        "0.experts(F)△", "0.combine(F)△",
        "1.router(I)▲", "1.router(W)▲", "1.attention(I)▲", "0.combine(I)▲", "1.attention(W)▲",
        "1.attention(F)△", "1.counts(F)△", "1.router(F)△", "1.dispatch(F)△",
        "0.experts(I)▲", "0.dispatch(I)▲", "0.experts(W)▲",
        "1.experts(F)△", "1.combine(F)△",
        "0.router(I)▲", "0.router(W)▲", "0.attention(I)▲", "p2p(I)▲", "0.attention(W)▲",
        "output(F)△", "p2p(F)△",
    ]  # fmt: skip


def test_the_gradient_leaves_before_the_last_weights_and_the_activation_after_the_last_forward() -> None:
    for layers in ("m", "sd", "ds", "d"):
        order = [piece for _, piece in pair_order(stage(layers), stage(layers))]
        gradient, last_weights = names(order).index("p2p(I)"), names(order).index("0.attention(W)")
        assert gradient == names(order).index("0.attention(I)") + 1 == last_weights - 1
        assert names(order).index("p2p(F)") == names(order).index("output(F)") + 1


def test_a_lone_backward_runs_weights_and_the_shared_expert_under_its_communication() -> None:
    assert names(backward_order(stage("ss"))) == [
        "output(I)", "1.combine(I)", "output(W)", "1.shared(I)", "1.shared(W)",
        "1.experts(I)", "1.dispatch(I)", "1.experts(W)",
        "1.router(I)", "1.router(W)", "1.attention(I)", "0.combine(I)", "1.attention(W)", "0.shared(I)", "0.shared(W)",
        "0.experts(I)", "0.dispatch(I)", "0.experts(W)",
        "0.router(I)", "0.router(W)", "0.attention(I)", "p2p(I)", "0.attention(W)",
    ]  # fmt: skip


def test_a_lone_forward_runs_the_shared_expert_under_the_dispatch() -> None:
    assert names(forward_order(stage("s"))) == [
        "0.attention(F)", "0.counts(F)", "0.router(F)", "0.dispatch(F)", "0.shared(F)", "0.experts(F)", "0.combine(F)",
        "output(F)", "p2p(F)",
    ]  # fmt: skip


def test_the_text_has_one_line_per_lane() -> None:
    compute_lane, communication_lane = two_lanes(pair_order(stage("s"), stage("s"))).splitlines()
    assert compute_lane.startswith("compute  output(I)▲")
    assert communication_lane.split()[:3] == ["comm", "0.combine(I)▲", "0.counts(F)△"]
    assert "p2p(I)▲" in communication_lane


LAYERS = st.text("msd", max_size=6)


@given(LAYERS, LAYERS)
def test_every_piece_runs_once_after_what_it_needs(ours: str, theirs: str) -> None:
    forward, backward = stage(ours), stage(theirs)
    order = pair_order(forward, backward)
    done: set[Paired] = set()
    for side, piece in order:
        assert (side, piece) not in done
        needed = _needs(forward if side is Side.FORWARD else backward, piece)
        assert needed <= {p for s, p in done if s is side}, f"{piece} before {needed}"
        done.add((side, piece))
    assert {p for s, p in done if s is Side.FORWARD} == set(forward_order(forward))
    assert {p for s, p in done if s is Side.BACKWARD} == set(backward_order(backward))


def _needs(segments: Sequence[Segment], piece: Piece) -> set[Piece]:
    """What must have run (communication: started) in the same chunk before a piece may."""

    def of(part: Kind, indices: list[int]) -> set[Piece]:
        found = [(i, segments[i]) for i in indices]
        return {Piece(part, i, s.name, s.lane, part is Kind.F and not s.has_backward) for i, s in found}

    everything = [i for i, s in enumerate(segments) if s.has_backward]
    if piece.is_message:
        return of(piece.part, list(range(len(segments))) if piece.part is Kind.F else everything)
    segment = segments[piece.index]
    if piece.part is Kind.F:
        return of(Kind.F, [i for i, s in enumerate(segments) if set(s.writes) & set(segment.reads)])
    if piece.part is Kind.I:
        return of(Kind.I, [i for i in everything if set(segments[i].reads) & set(segment.writes)])
    return of(Kind.I, [piece.index])


@given(LAYERS)
def test_a_backward_without_weights_leaves_them_all_for_later(layers: str) -> None:
    segments = stage(layers)
    whole = names(backward_order(segments))
    split = names(backward_order(segments, weights=False)) + names(weight_order(segments))
    assert sorted(split) == sorted(whole)
    assert [n for n in whole if not n.endswith("(W)")] == names(backward_order(segments, weights=False))


@given(LAYERS, LAYERS)
def test_a_chunk_runs_in_the_same_order_alone_and_in_a_pair(ours: str, theirs: str) -> None:
    order = pair_order(stage(ours), stage(theirs))
    assert [p for side, p in order if side is Side.FORWARD] == forward_order(stage(ours))
    assert [p for side, p in order if side is Side.BACKWARD] == backward_order(stage(theirs))


@pytest.mark.parametrize("layers", ["m", "s", "mm", "ss", "mmmm"])
def test_no_communication_is_waited_for_as_soon_as_it_starts(layers: str) -> None:
    """Between a communication's start and its first reader the other chunk always computes."""
    forward, backward = stage(layers), stage(layers)
    order = pair_order(forward, backward)
    for at, (side, piece) in enumerate(order):
        if piece.lane is not Lane.COMM or piece.is_message or piece.name.endswith("counts"):
            continue
        segments = forward if side is Side.FORWARD else backward
        reader = next(
            later
            for later, (s, p) in enumerate(order)
            if later > at and s is side and p.part is not Kind.W and piece in _needs(segments, p)
        )
        assert any(s is not side and p.lane is Lane.COMPUTE for s, p in order[at:reader]), f"{piece} is not hidden"


@pytest.mark.parametrize("layers", ["mm", "mmmm"])
def test_on_paper_a_balanced_pair_hides_almost_everything(layers: str) -> None:
    """Six compute pieces of 1 and four all-to-alls of 1.5 per layer: each lane needs 6; edges cost a little."""
    forward, backward = stage(layers), stage(layers)
    timeline = pair_timeline(pair_order(forward, backward), forward, backward)
    assert timeline.makespan <= 1.1 * 6 * len(layers)


def test_the_command_prints_and_draws_the_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pair", "--forward", "m", "--backward", "sd", "--out", str(tmp_path / "pair.svg")]) == 0
    printed = capsys.readouterr().out
    assert "0.dispatch(F)△" in printed
    drawn = (tmp_path / "pair.svg").read_text()
    assert "rank 0 compute" in drawn
    assert "rank 0 comm" in drawn
    assert "dispatch" in drawn
    assert main(["pair", "--forward", "mx"]) == 2
    assert "dense" in capsys.readouterr().err


def test_outlines_are_found_once_and_hold_the_orders_of_any_segments_like_these() -> None:
    outlines = Outlines()
    segments = stage("dm")
    outline = outlines.of(segments)
    assert outlines.of(stage("dm")) is outline  # made anew, as for another micro-batch
    assert list(outline.forward) == forward_order(segments)
    assert list(outline.backward) == backward_order(segments)
    assert list(outline.inputs) == backward_order(segments, weights=False)
    assert list(outline.weights) == weight_order(segments)
    longer = outlines.of(stage("mmm"))
    assert longer is not outline
    assert outlines.pair(longer, outline) == pair_order(stage("mmm"), segments)
    assert outlines.pair(outline, longer) == pair_order(segments, stage("mmm"))


def test_segments_that_read_something_else_have_another_outline() -> None:
    outlines = Outlines()
    first, *rest = segments = stage("dm")
    renamed = [first._replace(writes=("elsewhere",)), *rest]
    assert outlines.of(renamed) is not outlines.of(segments)
