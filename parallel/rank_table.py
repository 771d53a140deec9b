"""Where do the ranks sit: one line per node, and what has to cross from node to node.

Launchers give a node consecutive ranks, `ranks_per_node` each. A link between nodes is many times slower than one
inside a node (NVLink 160 GB/s, InfiniBand 50 GB/s on the report's H800s), and expert parallelism sends far more over
it than the pipeline: two all-to-alls per layer, against two messages per stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dualpipe.schedule import Schedule
from parallel.mesh import Layout

MOST_ROWS = 16


@dataclass(frozen=True)
class Crossing:
    """Which kinds of traffic leave a node."""

    pp: bool
    ep: bool

    @property
    def warning(self) -> str | None:
        """What to say when tokens take the slow links although the pipeline could."""
        if self.ep and not self.pp:
            return (
                "expert parallelism crosses nodes and the pipeline does not: every token's all-to-all takes the slow "
                "links; use parallel.order=pp_across_nodes, or a parallel.ep that fits in a node"
            )
        return None


def crossing(layout: Layout, ranks_per_node: int) -> Crossing:
    def leaves(groups: Iterable[Sequence[int]]) -> bool:
        return any(len({rank // ranks_per_node for rank in group}) > 1 for group in groups)

    return Crossing(leaves(layout.pipelines()), leaves(layout.expert_groups()))


def rank_table(layout: Layout, schedule: Schedule, ranks_per_node: int) -> str:
    """One line per node: its ranks, and the PP, DP and EP ranks and stages that they are; long tables are cut."""
    rows = [("node", "ranks", "pp", "dp", "ep", "stages")]
    nodes = -(-layout.world // ranks_per_node)
    shown = nodes if nodes <= MOST_ROWS else MOST_ROWS - 1
    for node in range(shown):
        ranks = range(node * ranks_per_node, min(layout.world, (node + 1) * ranks_per_node))
        pps = {layout.pp_of(rank) for rank in ranks}
        rows.append(
            (
                str(node),
                numbers(ranks),
                numbers(pps),
                numbers({layout.dp_of(rank) for rank in ranks}),
                numbers({layout.ep_of(rank) for rank in ranks}),
                numbers({stage for pp in pps for stage in schedule.stages_of(pp)}),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if shown < nodes:
        lines.append(f"… and {nodes - shown} more nodes")
    return "\n".join(lines)


def numbers(values: Iterable[int]) -> str:
    """`0–3,8`: runs of neighbours are joined."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)
