"""Steps as two micro-batches: real processes, the same texts as without, at any mix of full and idle ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dualpipe.clock import HostClock
from dualpipe.lanes import HostLanes, RecordingLanes
from model.decode import Piece
from serving.expert_groups import ServingGroups, serving_groups
from serving.expert_plan import ExpertSettings
from serving.micro_batches import halves
from tests.spawn import run_ranks
from tests.test_expert_parallel import EIGHT, Recorder, engine_of, requests, serve, shared


def test_halves_have_the_same_rows_in_the_same_order() -> None:
    slots = torch.arange(20)
    pieces = [Piece([1], slots[:5]), Piece([2, 3, 4, 5, 6], slots[:7]), Piece([7], slots[:1])]
    first, second = halves(pieces)
    assert [list(p.tokens) for p in first] == [[1], [2, 3, 4]]
    assert [list(p.tokens) for p in second] == [[5, 6], [7]]
    assert [p.past for p in first] == [4, 2]
    assert [p.past for p in second] == [5, 0]
    one, none = halves(pieces[:1])
    assert [list(p.tokens) for p in one] == [[1]]
    assert none == []
    assert halves([]) == ([], [])


CASES = {"decode": (False, ExpertSettings()), "drafts": (True, ExpertSettings(redundant=4, placement_every=3, slack=0))}


def _overlapped(rank: int, world: int) -> dict[str, tuple[int, int]]:
    groups, found = serving_groups(range(world)), {}
    for name, (drafts, settings) in CASES.items():
        count = (5, 0, 1)[rank]  # full, idle, and a step of a single row has an empty second half
        made, rows, steps = {}, {}, {}
        for least in (0, 1, 12):
            experts = shared(EIGHT, "fp64", groups, replace(settings, overlap_rows=least))
            engine = engine_of(experts.stage, drafts, experts)
            recorder = Recorder(engine)
            lanes = RecordingLanes(HostLanes(), HostClock())
            engine.decoder.start = lanes.start
            made[least] = serve(engine, requests(rank, count))
            rows[least], steps[least] = recorder.rows, experts.steps
            sent = sum(mark.name.endswith("dispatch") and "mtp" not in mark.name for mark in lanes.marks)
            layers = sum(layer.is_moe for layer in engine.decoder.layers)
            if least == 0:
                assert sent == layers * experts.steps
            if least == 1:
                assert sent == 2 * layers * experts.steps
            if least == 12:  # steps of prompts only
                assert layers * experts.steps < sent < 2 * layers * experts.steps
        assert made[0] == made[1] == made[12], name
        for least in (1, 12):
            for ours, wanted in zip(rows[least], rows[0], strict=True):
                torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-11 * float(wanted.abs().max()))
        found[name] = steps[0], steps[1]
    return found


def test_the_same_texts_in_two_micro_batches_on_three_ranks() -> None:
    for found in run_ranks(3, _overlapped):
        assert all(plain == overlapped > 0 for plain, overlapped in found.values())


def test_what_is_under_way_while_the_other_computes() -> None:
    """The order of the report: one's attention under the other's dispatch, its experts under the other's combine."""
    experts = shared(EIGHT, "fp32", ServingGroups(), ExpertSettings(overlap_rows=1))
    engine = engine_of(experts.stage, False, experts)
    order: list[str] = []
    attend = engine.decoder._attend

    def noted(layer, x, batch):  # type: ignore[no-untyped-def]
        order.append(f"{layer.label}.attention")
        return attend(layer, x, batch)

    def start(name, begin):  # type: ignore[no-untyped-def]
        if not name.endswith("counts"):
            order.append(name)
        return begin()

    engine.decoder._attend, engine.decoder.start = noted, start  # type: ignore[method-assign]
    for request in requests(0, 2):
        engine.add(request)
    engine.step()
    label = next(layer.label for layer in engine.decoder.layers if layer.is_moe)
    of_layer = [name.partition(".")[2] for name in order if name.startswith(f"{label}.")]
    assert of_layer == ["attention", "dispatch"] * 2 + ["combine"] * 2


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap_rows=-1"):
        ExpertSettings(overlap_rows=-1).check(8, 2)
