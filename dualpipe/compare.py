"""Schedules side by side: published formula against simulation, at equal stages and at equal devices.

*Equal stages*: the model is cut into PP stages, whatever the schedule. Those that hold two stages on a rank then use
PP/2 devices and take twice as long. This is the view of the published table.
*Equal devices*: R ranks, whatever the schedule. Where a rank holds two stages they are half as thick, so that the
model is the same. This is the view of whoever owns R devices.

Parameters and activations are those of the worst rank, in stages' worth (equal stages) or in R-ths of the model
(equal devices); so at equal devices the numbers of all schedules mean the same amount of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType

from dualpipe.costs import Costs
from dualpipe.schedules import SCHEDULES, make_schedule
from dualpipe.simulator import simulate
from dualpipe.table import format_table, span_of

Formula = Callable[[int, float, float, float, float], float]

# Bubble of every rank from ranks, F, B, W and F&B of one stage; published for the schedules named here.
FORMULAS: Mapping[str, Formula] = MappingProxyType(
    {
        "one_f_one_b": lambda ranks, f, b, w, pair: (ranks - 1) * (f + b),
        "gpipe": lambda ranks, f, b, w, pair: (ranks - 1) * (f + b),
        "interleaved_1f1b": lambda ranks, f, b, w, pair: (ranks - 1) * (f + b),
        "zb1p": lambda ranks, f, b, w, pair: (ranks - 1) * (f + b - 2 * w),
        "dualpipe": lambda ranks, f, b, w, pair: max(ranks / 2 - 1, 0) * (pair + b - 3 * w),
        "dualpipev": lambda ranks, f, b, w, pair: (ranks - 1) * (pair + b - 3 * w),
    }
)
STAGES_PER_RANK: Mapping[str, int] = MappingProxyType({"dualpipev": 2, "zbv": 2, "interleaved_1f1b": 2})


@dataclass(frozen=True)
class Row:
    """One schedule's figures; `formula` is None where no formula is published."""

    name: str
    ranks: int
    stages: int
    formula: float | None
    idle: tuple[float, ...]
    bubble: float
    parameters: float
    activations: float
    makespan: float


@dataclass(frozen=True)
class Refusal:
    """A schedule that cannot be made at the size in question, and why."""

    name: str
    reason: str


def compare(
    costs: Costs, num_micro_batches: int, equal: str, names: Sequence[str] = tuple(SCHEDULES)
) -> tuple[Row | Refusal, ...]:
    """Simulate each schedule at equal "stages" or "devices"; `costs` has one entry per stage, or per device."""
    if equal not in ("stages", "devices"):
        raise ValueError(f"compare at equal 'stages' or 'devices'; got {equal!r}")
    return tuple(_row(name, costs, num_micro_batches, equal) for name in names)


def _row(name: str, costs: Costs, num_micro_batches: int, equal: str) -> Row | Refusal:
    per_rank = STAGES_PER_RANK.get(name, 1)
    if equal == "devices":
        ranks, costs, thickness = costs.num_stages, costs.split(per_rank), 1 / per_rank
    elif costs.num_stages % per_rank:
        return Refusal(name, f"holds {per_rank} stages per rank, which does not divide {costs.num_stages}")
    else:
        ranks, thickness = costs.num_stages // per_rank, 1.0
    try:
        schedule = make_schedule(name, ranks, num_micro_batches)
    except ValueError as error:
        return Refusal(name, str(error))
    timeline = simulate(schedule, costs)
    return Row(
        name=name,
        ranks=ranks,
        stages=schedule.num_stages,
        formula=formula_bubble(name, ranks, costs),
        idle=timeline.idle,
        bubble=timeline.bubble,
        parameters=max(len(schedule.stages_of(rank)) for rank in range(ranks)) * thickness,
        activations=max(timeline.peak_activations) * thickness,
        makespan=timeline.makespan,
    )


def formula_bubble(name: str, ranks: int, costs: Costs) -> float | None:
    """The published bubble, at the mean of the stages' costs; None where none is published."""
    if name not in FORMULAS:
        return None
    f, b, w = fmean(costs.forward), fmean(costs.backward), fmean(costs.weights)
    return FORMULAS[name](ranks, f, b, w, fmean(costs.overlaps) * (f + b))


HEAD = ("schedule", "ranks", "stages", "formula", "idle", "differs by", "bubble", "params", "acts", "makespan")


def comparison_table(rows: Sequence[Row | Refusal]) -> str:
    """The rows as text, followed by a line for each schedule that does not fit."""
    cells = [_cells(row) for row in rows if isinstance(row, Row)]
    refused = [f"{row.name}: {row.reason}" for row in rows if isinstance(row, Refusal)]
    return "\n".join([format_table(HEAD, cells), *refused])


def _cells(row: Row) -> tuple[str, ...]:
    formula, differs = "—", "—"
    if row.formula is not None:
        formula, differs = f"{row.formula:.4g}", span_of([round(idle - row.formula, 9) + 0.0 for idle in row.idle])
    return (
        row.name, str(row.ranks), str(row.stages), formula, span_of(row.idle), differs, f"{row.bubble:.1%}",
        f"{row.parameters:g}×", f"{row.activations:g}", f"{row.makespan:.6g}",
    )  # fmt: skip
