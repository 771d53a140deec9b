"""From a measured Timeline back to costs: so that what was measured can be held against what it should have been."""

from __future__ import annotations

import statistics
from collections import defaultdict

from dualpipe.costs import Costs
from dualpipe.schedule import Kind, Pair, parse_step
from dualpipe.timeline import Timeline


def costs_of(timeline: Timeline, num_stages: int) -> Costs:
    """The median F, I, W and B of each stage, of what ran outside pairs, and what a pair took of its F + B.

    What a stage never did alone is made of the rest: B = I + W, and I and W are halves of B. Messages count nothing: a
    simulation at these costs is the schedule on links without delay. Raises ValueError for a stage without any time.
    """
    alone: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    pairs: list[tuple[Pair, float]] = []
    for span in (span for row in timeline.computing for span in row):
        step, took = parse_step(span.label), span.end - span.start
        if isinstance(step, Pair):
            pairs.append((step, took))
        else:
            alone[step.kind, step.stage].append(took)
    times = {key: statistics.median(found) for key, found in alone.items()}
    for stage in range(num_stages):
        _complete(times, stage, pairs)
    ratios = [
        took / (times[Kind.F, pair.forward.stage] + times[Kind.B, pair.backward.stage])
        for pair, took in pairs
        if times[Kind.F, pair.forward.stage] + times[Kind.B, pair.backward.stage] > 0
    ]
    rows = {kind: tuple(times[kind, stage] for stage in range(num_stages)) for kind in Kind}
    return Costs(
        forward=rows[Kind.F],
        inputs=rows[Kind.I],
        weights=rows[Kind.W],
        backward=rows[Kind.B],
        overlap=statistics.median(ratios) if ratios else 1.0,
    )


def _complete(times: dict[tuple[Kind, int], float], stage: int, pairs: list[tuple[Pair, float]]) -> None:
    """Fill in what one stage never did alone."""
    if (Kind.F, stage) not in times:
        whole = [took for pair, took in pairs if pair.forward.stage == stage]
        if not whole:
            raise ValueError(f"{stage}F was not measured")
        times[Kind.F, stage] = statistics.median(whole) / 3  # a backward is about twice a forward
    back = times.get((Kind.B, stage))
    if back is None and (Kind.I, stage) in times:
        back = times[Kind.I, stage] + times.get((Kind.W, stage), 0.0)
    if back is None:
        whole = [took for pair, took in pairs if pair.backward.stage == stage]
        if not whole:
            raise ValueError(f"{stage}B was not measured")
        back = 2 * statistics.median(whole) / 3
    times.setdefault((Kind.B, stage), back)
    times.setdefault((Kind.I, stage), back / 2)
    times.setdefault((Kind.W, stage), back / 2)
