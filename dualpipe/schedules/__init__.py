"""The schedules by name. A new one is one file with a generator and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from dualpipe.schedule import Schedule
from dualpipe.schedules.dualpipe import dualpipe
from dualpipe.schedules.one_f_one_b import one_f_one_b

Generator = Callable[[int, int], Schedule]

SCHEDULES: Mapping[str, Generator] = MappingProxyType(
    {
        "dualpipe": dualpipe,
        "one_f_one_b": one_f_one_b,
    }
)


def make_schedule(name: str, num_ranks: int, num_micro_batches: int) -> Schedule:
    """Generate a schedule by name. Raises ValueError for an unknown name or sizes that the schedule cannot take."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](num_ranks, num_micro_batches)
