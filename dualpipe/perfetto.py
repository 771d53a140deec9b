"""Timelines as a trace for ui.perfetto.dev (the JSON trace-event format, which chrome://tracing reads too).

Each timeline and rank is a process and each lane a thread, so one file holds predicted and measured below each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dualpipe.schedule import parse_step, parts
from dualpipe.timeline import COMPUTE, Span, Timeline


def to_perfetto(timelines: Sequence[Timeline], microseconds: float = 1000.0) -> str:
    """The trace as JSON text. `microseconds` is the length of one unit of time: 1e6 if times are in seconds."""
    if not microseconds > 0:
        raise ValueError(f"a unit of time must last longer than 0 microseconds; got {microseconds}")
    events: list[dict[str, Any]] = []
    for number, timeline in enumerate(timelines):
        first = sum(t.num_ranks for t in timelines[:number])
        lanes = list(dict.fromkeys([COMPUTE, *(span.lane for span in timeline.spans)]))
        for rank in range(timeline.num_ranks):
            events.append(_name("process_name", first + rank, 0, f"{timeline.name} rank {rank}"))
            events += [_name("thread_name", first + rank, thread, lane) for thread, lane in enumerate(lanes)]
        for span in timeline.spans:
            events.append(
                {
                    "name": span.label,
                    "cat": span.lane,
                    "ph": "X",  # a complete event: begin and duration
                    "pid": first + span.rank,
                    "tid": lanes.index(span.lane),
                    "ts": (span.start - timeline.start) * microseconds,
                    "dur": (span.end - span.start) * microseconds,
                    "args": _details(span),
                }
            )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _name(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _details(span: Span) -> dict[str, Any]:
    if span.lane != COMPUTE:
        return {}
    actions = parts(parse_step(span.label))
    return {
        "kind": "&".join(action.kind.value for action in actions),
        "stage": [action.stage for action in actions],
        "micro_batch": [action.micro_batch for action in actions],
    }
