"""The schedules by name. A new one is one file with a generator and one line here.

A generator takes the number of ranks and of micro-batches, and options of its own as keywords with defaults.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from dualpipe.schedule import Schedule
from dualpipe.schedules.dualpipe import dualpipe
from dualpipe.schedules.dualpipev import dualpipev
from dualpipe.schedules.gpipe import gpipe
from dualpipe.schedules.interleaved_1f1b import interleaved_1f1b
from dualpipe.schedules.one_f_one_b import one_f_one_b
from dualpipe.schedules.zb1p import zb1p
from dualpipe.schedules.zbv import zbv

Generator = Callable[..., Schedule]
LARGEST = 2_000_000  # forwards; keeps a typing error from filling the memory

SCHEDULES: Mapping[str, Generator] = MappingProxyType(
    {
        "dualpipe": dualpipe,
        "dualpipev": dualpipev,
        "one_f_one_b": one_f_one_b,
        "interleaved_1f1b": interleaved_1f1b,
        "zb1p": zb1p,
        "zbv": zbv,
        "gpipe": gpipe,
    }
)


def options_of(name: str) -> dict[str, int]:
    """The options that a schedule takes beyond ranks and micro-batches, with their defaults."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    return {p.name: p.default for p in list(inspect.signature(SCHEDULES[name]).parameters.values())[2:]}


def make_schedule(name: str, num_ranks: int, num_micro_batches: int, **options: int) -> Schedule:
    """Generate a schedule by name, e.g. make_schedule("interleaved_1f1b", 4, 12, chunks=3).

    Raises ValueError for an unknown name or option, or for sizes that the schedule cannot take.
    """
    allowed = options_of(name)
    for option in options:
        if option not in allowed:
            known = ", ".join(allowed) or "none"
            raise ValueError(f"{name} has no option {option!r}; it has: {known}")
    size = num_ranks * num_micro_batches * math.prod(options.values())
    if num_ranks > 0 and size > LARGEST:
        asked = "".join(f", {option}={value}" for option, value in options.items())
        raise ValueError(
            f"{name} of {num_ranks} ranks, {num_micro_batches} micro-batches{asked} would have {size} forwards; "
            f"at most {LARGEST} are made"
        )
    return SCHEDULES[name](num_ranks, num_micro_batches, **options)
