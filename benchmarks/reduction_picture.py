"""Draw the end of a step: what a rank computes, and beside it the sums of gradients from their start to their end.

What lies left of the end of the pipeline is hidden; the hatched part is what the rank waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dualpipe.plot import COLOURS, INK, NAMES, PAPER
from dualpipe.schedule import Kind, Pair, parse_step

SUMS = "#8d8d8d"


@dataclass(frozen=True)
class Tail:
    """One rank's step, in ms after the end of its pipeline.

    computed   (step of the schedule, start, end)
    sums       (bucket, start, start of waiting, end of waiting)
    """

    rank: int
    computed: tuple[tuple[str, float, float], ...]
    sums: tuple[tuple[str, float, float, float], ...]


def save_tails(tails: Sequence[Tail], path: Path, title: str, begin: float) -> None:
    """Write the picture; `begin` is where it starts, in ms before the end of the pipeline (negative)."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    labels = [label for tail in tails for label in (f"rank {tail.rank} computes", *(s[0] for s in tail.sums))]
    figure = Figure(figsize=(12, 1.2 + 0.3 * len(labels)), facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot()
    row, kinds = 0, set()
    for tail in tails:
        for text, start, end in tail.computed:
            if end > begin:
                kinds.add(kind := kind_of(text))
                axes.barh(row, end - start, left=start, color=COLOURS[kind], edgecolor=PAPER, height=0.8)
        for number, (_, start, waiting, end) in enumerate(tail.sums, row + 1):
            axes.barh(number, waiting - start, left=start, color=SUMS, height=0.6)
            axes.barh(number, end - waiting, left=waiting, color=PAPER, edgecolor=SUMS, hatch="////", height=0.6)
        row += 1 + len(tail.sums)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_xlim(left=begin)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms after the end of the pipeline")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.spines[["left", "right", "top"]].set_visible(False)
    handles = [Patch(facecolor=COLOURS[k], label=NAMES[k]) for k in sorted(kinds)]
    handles += [
        Patch(facecolor=SUMS, label="sum under way"),
        Patch(facecolor=PAPER, edgecolor=SUMS, hatch="////", label="waited for"),
    ]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def kind_of(text: str) -> Kind:
    """The colour of a step; a pair counts as its backward."""
    step = parse_step(text)
    return step.backward.kind if isinstance(step, Pair) else step.kind
