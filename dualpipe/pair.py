"""A pair on paper: the segments of usual layers without their work, and what their order does with two lanes.

Layers are given as letters: m a MoE layer, s a MoE layer with a shared expert, d a dense layer. Costs are in units of
an attention's forward; what communicates costs `communication` per all-to-all.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from dualpipe.overlap import Paired, Piece, Side
from dualpipe.schedule import Kind
from dualpipe.stage import Lane, Segment, communicate, compute
from dualpipe.timeline import Span, Timeline

COSTS = {
    "attention": 1.0,
    "mlp": 1.0,
    "experts": 1.0,
    "shared": 0.2,
    "router": 0.02,
    "output": 0.05,
    "counts": 0.02,
    "p2p": 0.3,
}
Residual = tuple[str, ...]
_COUNTS = SimpleNamespace(start=None, start_backward=None)
_TOKENS = SimpleNamespace(start=None, start_backward=len)


def stage_segments(layers: str) -> list[Segment]:
    """The segments of a stage in the middle of the model. Raises ValueError for letters other than m, s and d."""
    residual: Residual = ("in0",)
    segments: list[Segment] = []
    for number, kind in enumerate(layers):
        if kind not in "msd":
            raise ValueError(f"{layers!r}: write a layer as m (MoE), s (MoE with a shared expert) or d (dense)")
        more, residual = _dense(number, residual) if kind == "d" else _moe(number, residual, kind == "s")
        segments += more
    return [*segments, compute("output", residual, ("out0",), len)]


def _moe(layer: int, residual: Residual, shared: bool) -> tuple[list[Segment], Residual]:
    names = ["h", "x", "scores", "chosen", "sizes", "gates", "rows", "weighted", "s", "y"]
    h, x, scores, chosen, sizes, gates, rows, weighted, s, y = (f"{layer}.{name}" for name in names)
    segments = [
        compute(f"{layer}.attention", residual, (h, x, scores, chosen), len),
        communicate(f"{layer}.counts", (chosen,), (sizes,), _COUNTS),
        compute(f"{layer}.router", (scores,), (gates,), len),
        communicate(f"{layer}.dispatch", (x, gates, chosen, sizes), (rows,), _TOKENS),
        *([compute(f"{layer}.shared", (x,), (s,), len)] if shared else []),
        compute(f"{layer}.experts", (rows,), (weighted,), len),
        communicate(f"{layer}.combine", (weighted,), (y,), _TOKENS),
    ]
    return segments, (h, s, y) if shared else (h, y)


def _dense(layer: int, residual: Residual) -> tuple[list[Segment], Residual]:
    h, out = f"{layer}.h", f"{layer}.out"
    return [compute(f"{layer}.attention", residual, (h,), len), compute(f"{layer}.mlp", (h,), (out,), len)], (out,)


def pair_timeline(
    order: Sequence[Paired], forward: Sequence[Segment], backward: Sequence[Segment], communication: float = 1.5
) -> Timeline:
    """Run an order on two lanes: compute waits for what it reads, a lane does one thing at a time."""
    free = {Lane.COMPUTE: 0.0, Lane.COMM: 0.0}
    ends: dict[Paired, float] = {}
    spans = []
    for side, piece in order:
        cost = COSTS.get(piece.name.split(".")[-1], communication)
        segments = forward if side is Side.FORWARD else backward
        start = max(free[Lane.COMPUTE], free[piece.lane])
        if piece.lane is Lane.COMPUTE:
            start = max([start, *(ends[p] for p in ends if p[0] is side and _feeds(segments, p[1], piece))])
        free[piece.lane] = ends[side, piece] = start + cost
        label = f"{piece.name}({piece.part.value}){'▲' if side is Side.BACKWARD else '△'}"
        spans.append(Span(0, piece.lane.value, label, start, start + cost))
    return Timeline("one pair, planned", 1, tuple(spans))


def _feeds(segments: Sequence[Segment], source: Piece, piece: Piece) -> bool:
    """Does a piece read what a communication of the same chunk brings?"""
    if source.lane is not Lane.COMM or source.is_message or source.part is not piece.part:
        return False
    ours, theirs = segments[piece.index], segments[source.index]
    if piece.part is Kind.F:
        return bool(set(theirs.writes) & set(ours.reads))
    return bool(set(theirs.reads) & set(ours.writes))
