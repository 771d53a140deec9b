"""The process groups between which tokens travel to their experts.

An EP group is `nodes` × `local` ranks, node by node: position p of the group is rank p % local of node p // local.
Expert e of E lives on position e // (E / EP). Backends that do not care about nodes use `whole`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist


@dataclass(frozen=True)
class ExpertGroups:
    """One rank's view of its EP group.

    whole    all its ranks, for tokens
    counts   the same ranks again, for the exchange of counts: its small messages do not queue behind tokens
    rail     the ranks at the same place in every node; None if there is one node or no need
    node     the ranks of this node; None if it has one rank or no need
    """

    position: int
    nodes: int
    local: int
    whole: dist.ProcessGroup
    counts: dist.ProcessGroup
    rail: dist.ProcessGroup | None = None
    node: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return self.nodes * self.local


def split_nodes(ep: int, ranks_per_node: int) -> tuple[int, int]:
    """(nodes, ranks in each) of an EP group. Raises ValueError if it would hold parts of nodes unevenly."""
    small, large = sorted((ep, ranks_per_node))
    if ranks_per_node < 1 or large % small:
        raise ValueError(
            f"parallel.ep={ep} and parallel.ranks_per_node={ranks_per_node} do not divide each other, so an expert "
            f"group would hold a part of a node; change one of them, or use parallel.dispatch=all_to_all"
        )
    return (1, ep) if ep <= ranks_per_node else (ep // ranks_per_node, ranks_per_node)


def create_expert_groups(
    expert_groups: Sequence[Sequence[int]], timeout: timedelta, ranks_per_node: int | None = None
) -> ExpertGroups | None:
    """Make the groups of all EP groups (lists of global ranks) and return this process's; None if EP is 1.

    Collective over the default group. `ranks_per_node` asks for the groups inside and across nodes.
    """
    mine = None
    for ranks in expert_groups:
        if len(ranks) == 1:
            continue
        nodes, local = split_nodes(len(ranks), ranks_per_node) if ranks_per_node else (len(ranks), 1)
        whole, counts = (dist.new_group(list(ranks), timeout=timeout) for _ in range(2))
        rail = [_group(ranks[place::local], timeout) for place in range(local)] if ranks_per_node else []
        node = [_group(ranks[n * local : (n + 1) * local], timeout) for n in range(nodes)] if ranks_per_node else []
        if dist.get_rank() in ranks:
            at = list(ranks).index(dist.get_rank())
            crossing, inside = (rail[at % local], node[at // local]) if ranks_per_node else (None, None)
            mine = ExpertGroups(at, nodes, local, whole, counts, crossing, inside)
    return mine


def _group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup | None:
    return dist.new_group(list(ranks), timeout=timeout) if len(ranks) > 1 else None
