"""Pictures and traces: everything that ran is in them, legible, and the same bytes each time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dualpipe.__main__ import main
from dualpipe.costs import uniform
from dualpipe.perfetto import to_perfetto
from dualpipe.plot import COLOURS, cell_colour, contrast, draw, ink_on, save_plot
from dualpipe.schedule import Action, Pair
from dualpipe.schedules import make_schedule
from dualpipe.simulator import simulate
from dualpipe.timeline import Span, Timeline

SCHEDULE = make_schedule("dualpipe", 4, 8)
TIMELINE = simulate(SCHEDULE, uniform(4))


def test_every_micro_batch_of_every_step_is_in_the_picture(tmp_path: Path) -> None:
    save_plot([TIMELINE], tmp_path / "d.svg")
    svg = (tmp_path / "d.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", re.sub(r'(?s)<g id="xtick_.*?</text>', "", svg))
    actions = [action for rank in range(4) for action in SCHEDULE.actions(rank)]
    for micro_batch in range(8):
        wanted = sum(action.micro_batch == micro_batch for action in actions)
        assert texts.count(str(micro_batch)) == wanted
    assert "rank 3" in texts
    assert "overlapped pair" in texts


def test_pairs_share_a_border() -> None:
    (axes,) = draw([TIMELINE]).axes
    borders = [patch for patch in axes.patches if not patch.get_fill()]
    assert len(borders) == sum(isinstance(step, Pair) for row in SCHEDULE.steps for step in row)


def test_two_timelines_are_drawn_below_each_other_on_one_scale() -> None:
    later = Timeline("measured", 1, (Span(0, "compute", "0F0", 50.0, 70.0),))
    upper, lower = draw([TIMELINE, later]).axes
    assert upper.get_xlim() == lower.get_xlim() == (0.0, TIMELINE.makespan)
    assert upper.get_position().y0 > lower.get_position().y1


def test_the_same_schedule_gives_the_same_svg(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        save_plot([TIMELINE], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("kind", COLOURS)
@pytest.mark.parametrize("strength", [0.55, 0.7, 0.85, 1.0])
def test_numbers_are_legible_on_every_colour(kind: str, strength: float) -> None:
    fill = cell_colour(Action(kind, 0, 0), {0: strength})  # type: ignore[arg-type]
    assert contrast(ink_on(fill), fill) >= 4.5
    assert contrast((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) == pytest.approx(21)


def test_the_command_writes_each_kind_of_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("x.png", "x.svg", "x.json")]
    outs = [argument for file in files for argument in ("--out", str(file))]
    assert main(["plot", "--schedule", "zbv", "--ranks", "2", "--micro-batches", "4", *outs]) == 0
    assert capsys.readouterr().out.split() == list(map(str, files))
    png, svg, trace = (file.read_bytes() for file in files)
    assert png.startswith(b"\x89PNG")
    assert b"<svg" in svg
    assert json.loads(trace)["traceEvents"]


@pytest.mark.parametrize(
    ("out", "message"), [("x.gif", "name the picture .svg or .png"), ("/no/such/folder/x.svg", "cannot write /no/such")]
)
def test_what_cannot_be_written_is_said(out: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "--schedule", "zbv", "--ranks", "2", "--out", out]) == 2
    assert message in capsys.readouterr().err


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([Timeline("empty", 2, ())])


def test_without_matplotlib_the_error_names_it_and_the_rest_works() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None\n"
        "from dualpipe.__main__ import main\n"
        "arguments = ['--schedule', 'zbv', '--ranks', '2', '--micro-batches', '4']\n"
        "assert main(['show', *arguments]) == 0\n"
        "sys.exit(max(main([*words, '--out', 'x.svg']) for words in (['plot', *arguments], ['pair'])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("pip install matplotlib") == 2
    assert done.stdout.startswith("0F0,")


def test_perfetto_holds_every_span_of_every_timeline() -> None:
    measured = Timeline("measured", 1, (Span(0, "compute", "0F3", 100.0, 100.5), Span(0, "link", "any", 100.5, 101.0)))
    trace = json.loads(to_perfetto([TIMELINE, measured], microseconds=1e6))
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(complete) == len(TIMELINE.spans) + 2
    first, last = complete[-2:]
    assert first["args"] == {"kind": "F", "stage": [0], "micro_batch": [3]}
    assert (first["pid"], first["tid"], first["ts"], first["dur"]) == (4, 0, 0.0, 0.5e6)
    assert (last["tid"], last["ts"]) == (1, 0.5e6)
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert {"dualpipe rank 3", "measured rank 0", "compute", "link"} <= names
    with pytest.raises(ValueError, match="longer than 0 microseconds; got 0"):
        to_perfetto([TIMELINE], microseconds=0)
