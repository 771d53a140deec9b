"""Design, check, predict, draw and run pipeline schedules. Needs torch only (pictures: matplotlib).

    from dualpipe import Pipeline, make_schedule, simulate

The names below are loaded when they are first used, so that working with schedules does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualpipe.auto import Found, search
    from dualpipe.costs import Costs, uniform
    from dualpipe.csvio import read_csv
    from dualpipe.pipeline import Pipeline
    from dualpipe.plot import save_plot
    from dualpipe.runtime import PipelineError, Runtime
    from dualpipe.schedule import Action, Kind, Pair, Schedule
    from dualpipe.schedules import SCHEDULES, make_schedule
    from dualpipe.simulator import simulate
    from dualpipe.timeline import Span, Timeline
    from dualpipe.validate import InvalidScheduleError, validate

_HOMES = (
    ("auto", ("Found", "search")),
    ("costs", ("Costs", "uniform")),
    ("csvio", ("read_csv",)),
    ("pipeline", ("Pipeline",)),
    ("plot", ("save_plot",)),
    ("runtime", ("PipelineError", "Runtime")),
    ("schedule", ("Action", "Kind", "Pair", "Schedule")),
    ("schedules", ("SCHEDULES", "make_schedule")),
    ("simulator", ("simulate",)),
    ("timeline", ("Span", "Timeline")),
    ("validate", ("InvalidScheduleError", "validate")),
)

__all__ = [  # noqa: RUF022 - in the order of their homes
    "Found", "search", "Costs", "uniform", "read_csv", "Pipeline", "save_plot", "PipelineError", "Runtime",
    "Action", "Kind", "Pair", "Schedule", "SCHEDULES", "make_schedule", "simulate", "Span", "Timeline",
    "InvalidScheduleError", "validate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in _HOMES:
        if name in names:
            return getattr(import_module(f"dualpipe.{module}"), name)
    raise AttributeError(f"module 'dualpipe' has no attribute {name!r}")
