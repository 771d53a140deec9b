"""Draw timelines in the manner of the DualPipe report: rows are ranks, colours are kinds, numbers are micro-batches.

An overlapped pair is one box with a dark border, its forward above its backward: both run for the whole of it. Where
a rank holds several stages, the lightest shade is the stage it starts with. Grey is idle. Several timelines are drawn
below each other on one scale, e.g. predicted and measured.

Needs matplotlib, which is an extra. Figures are objects of their own; pyplot and its global state are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dualpipe.schedule import Action, Kind, Pair, Step, parse_step, parts
from dualpipe.timeline import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Colour = tuple[float, float, float]

COLOURS = MappingProxyType(
    {
        Kind.F: (0.94, 0.62, 0.13),
        Kind.B: (0.13, 0.52, 0.36),
        Kind.I: (0.15, 0.50, 0.76),
        Kind.W: (0.51, 0.37, 0.69),
    }
)
NAMES = MappingProxyType(
    {Kind.F: "forward", Kind.B: "backward", Kind.I: "backward for inputs", Kind.W: "backward for weights"}
)
INK: Colour = (0.10, 0.11, 0.14)
PAPER: Colour = (1.0, 1.0, 1.0)
IDLE: Colour = (0.91, 0.92, 0.93)
PALEST = 0.55  # strength of the palest shade of a colour; 1 is the colour itself

ROW = 0.42  # inches per rank
CELL = 0.30  # inches per forward, as far as WIDEST allows
NARROWEST, WIDEST = 9.6, 44.0  # inches; the legend needs room
DIGIT = 0.085  # inches of width that one digit needs


def save_plot(timelines: Sequence[Timeline], path: str | Path) -> None:
    """Draw the timelines below each other and write .svg or .png, as the name of the file says."""
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"{path}: name the picture .svg or .png")
    figure = draw(timelines)
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dualpipe"}):  # text stays text, ids repeat
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw(timelines: Sequence[Timeline]) -> Figure:
    """The picture as a matplotlib figure. Raises ValueError without matplotlib or without anything to draw."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("drawing needs matplotlib: pip install matplotlib (or write Perfetto's .json)") from None
    if not timelines or any(not timeline.makespan for timeline in timelines):
        raise ValueError("nothing to draw: a timeline without compute spans of any length")
    longest = max(timeline.makespan for timeline in timelines)
    inches = min(max(longest * CELL / _unit(timelines), NARROWEST), WIDEST)  # of the longest row
    left, right, title, axis, legend = 0.75, 0.95, 0.42, 0.30, 0.36
    heights = [title + ROW * timeline.num_ranks + axis for timeline in timelines]
    width, height = left + inches + right, sum(heights) + legend
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    top = height
    for timeline, tall in zip(timelines, heights, strict=True):
        top -= tall
        box = (left / width, (top + axis) / height, inches / width, ROW * timeline.num_ranks / height)
        _panel(figure.add_axes(box), timeline, longest, inches / longest)
    _legend(figure, timelines)
    return figure


def _unit(timelines: Sequence[Timeline]) -> float:
    """The median time of a forward on its own (of any step, if there is none): what one cell's width stands for."""
    spans = [span for timeline in timelines for row in timeline.computing for span in row]
    forwards = [s.end - s.start for s in spans if "F" in s.label and not s.label.startswith("(") and s.end > s.start]
    lengths = sorted(forwards or [s.end - s.start for s in spans if s.end > s.start])
    return lengths[len(lengths) // 2]


def _panel(axes: Any, timeline: Timeline, longest: float, inches_per_time: float) -> None:
    from matplotlib.patches import Rectangle

    axes.set_xlim(0, longest)
    axes.set_ylim(timeline.num_ranks, 0)
    for rank, row in enumerate(timeline.computing):
        axes.add_patch(Rectangle((0, rank + 0.06), timeline.makespan, 0.88, facecolor=IDLE, linewidth=0))
        shades = _shades(row)
        for span in row:
            _draw_span(axes, span, timeline.start, shades, inches_per_time)
        axes.text(
            longest + 0.08 / inches_per_time, rank + 0.5, f"idle {timeline.idle[rank]:.3g}",
            va="center", ha="left", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_yticks(
        [rank + 0.5 for rank in range(timeline.num_ranks)], [f"rank {r}" for r in range(timeline.num_ranks)]
    )
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.tick_params(axis="x", length=3, labelsize=8)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_title(
        f"{timeline.name}: makespan {timeline.makespan:.4g}, bubble {timeline.bubble:.1%}, "
        f"at most {max(timeline.peak_activations)} activations per rank",
        loc="left", fontsize=11, color=INK, fontweight="bold",
    )  # fmt: skip


def _shades(row: Sequence[Span]) -> dict[int, float]:
    """How strong each stage's colours are on one rank: the stage that it starts with lightest."""
    stages = list(dict.fromkeys(action.stage for span in row for action in parts(parse_step(span.label))))
    if len(stages) == 1:
        return {stages[0]: 1.0}
    return {stage: PALEST + (1 - PALEST) * place / (len(stages) - 1) for place, stage in enumerate(stages)}


def _draw_span(axes: Any, span: Span, origin: float, shades: dict[int, float], inches_per_time: float) -> None:
    from matplotlib.patches import Rectangle

    step: Step = parse_step(span.label)
    begin, length = span.start - origin, span.end - span.start
    actions = parts(step)
    tall = 0.88 / len(actions)
    for place, action in enumerate(actions):
        top = span.rank + 0.06 + place * tall
        fill = cell_colour(action, shades)
        axes.add_patch(Rectangle((begin, top), length, tall, facecolor=fill, edgecolor=PAPER, linewidth=0.8))
        label = str(action.micro_batch)
        room = length * inches_per_time / (len(label) * DIGIT)
        if room >= 0.55:
            size = min(9.5 if len(actions) == 1 else 8.0, 9.5 * room)
            axes.text(
                begin + length / 2, top + tall / 2 + 0.02, label,
                ha="center", va="center", fontsize=size, color=ink_on(fill), clip_on=True,
            )  # fmt: skip
    if isinstance(step, Pair):
        axes.add_patch(
            Rectangle((begin, span.rank + 0.06), length, 0.88, fill=False, edgecolor=INK, linewidth=1.3, zorder=3)
        )


def cell_colour(action: Action, shades: dict[int, float]) -> Colour:
    return _tint(COLOURS[action.kind], shades[action.stage])


def _tint(colour: Colour, strength: float) -> Colour:
    red, green, blue = (strength * c + (1 - strength) for c in colour)
    return red, green, blue


def ink_on(fill: Colour) -> Colour:
    """Black or white text, whichever reads better: one of them reaches a contrast of 4.58 on every colour."""
    black = (0.0, 0.0, 0.0)
    return black if contrast(black, fill) >= contrast(PAPER, fill) else PAPER


def contrast(one: Colour, other: Colour) -> float:
    """Contrast ratio of two colours as WCAG 2 defines it, 1 to 21; text wants 4.5."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: Colour) -> float:
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _legend(figure: Figure, timelines: Sequence[Timeline]) -> None:
    from matplotlib.patches import Patch

    steps = [parse_step(span.label) for timeline in timelines for row in timeline.computing for span in row]
    kinds = {action.kind for step in steps for action in parts(step)}
    patches = [Patch(facecolor=COLOURS[kind], label=NAMES[kind]) for kind in Kind if kind in kinds]
    if any(isinstance(step, Pair) for step in steps):
        patches.append(Patch(facecolor=PAPER, edgecolor=INK, linewidth=1.3, label="overlapped pair"))
    patches.append(Patch(facecolor=IDLE, label="idle"))
    if any(len(_shades(row)) > 1 for timeline in timelines for row in timeline.computing):
        pale = _tint(COLOURS[Kind.F], PALEST)
        patches.append(Patch(facecolor=pale, label="pale: the stage a rank starts with"))
    figure.legend(handles=patches, loc="lower center", ncols=len(patches), frameon=False, fontsize=9, labelcolor=INK)
