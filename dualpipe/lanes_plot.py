"""Draw what ran on the lanes of each rank, piece by piece: compute above communication. Planned or recorded alike.

The labels of the spans are pieces, such as `0.experts(I)▲` or `0.dispatch(F) of 1.3`; colours say which part they are.
Needs matplotlib, as `plot.py` does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from dualpipe.plot import COLOURS, INK, NAMES, PAPER
from dualpipe.schedule import Kind
from dualpipe.timeline import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PART = re.compile(r"\((F|I|W)\)")


def save_lanes(timeline: Timeline, path: Path, unit: str = "") -> None:
    """Write the picture as .svg or .png. Raises ValueError for another name, an empty timeline, or no matplotlib."""
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"{path}: name the picture .svg or .png")
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ValueError("drawing needs matplotlib: pip install matplotlib") from None

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dualpipe"}):
        draw_lanes(timeline, unit).savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_lanes(timeline: Timeline, unit: str = "") -> Figure:
    """One row per rank and lane."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    if not timeline.makespan:
        raise ValueError("nothing to draw: a timeline without spans of any length")
    rows = sorted({(s.rank, s.lane != "compute", s.lane) for s in timeline.spans})
    figure = Figure(figsize=(16, 1.1 + 0.62 * len(rows)), facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot()
    for span in timeline.spans:
        row = rows.index((span.rank, span.lane != "compute", span.lane))
        begin, length = span.start - timeline.start, span.end - span.start
        kind = part_of(span)
        axes.add_patch(
            Rectangle((begin, row + 0.08), length, 0.84, facecolor=COLOURS[kind], edgecolor=PAPER, linewidth=0.6)
        )
        text = _PART.split(span.label)[0].split(".")[-1]
        if length / timeline.makespan * 15 > 0.075 * len(text):  # inches
            axes.text(begin + length / 2, row + 0.5, text, ha="center", va="center", fontsize=7, color=INK)
    axes.set_xlim(0, timeline.makespan)
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([r + 0.5 for r in range(len(rows))], [f"rank {rank} {lane}" for rank, _, lane in rows])
    axes.set_title(timeline.name, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_xlabel(unit)
    axes.spines[["left", "right", "top"]].set_visible(False)
    kinds = sorted({part_of(span) for span in timeline.spans})
    handles = [Patch(facecolor=COLOURS[k], label=NAMES[k]) for k in kinds]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False, fontsize=8)
    return figure


def part_of(span: Span) -> Kind:
    """F, I or W, from the label."""
    found = _PART.search(span.label)
    if found is None:
        raise ValueError(f"{span.label!r} does not name a piece, such as 0.experts(I)")
    return Kind(found[1])
