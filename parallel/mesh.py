"""Who works with whom: PP × DP ranks, with expert parallelism inside DP.

    dp = block · EP + ep         EP groups are runs of EP neighbours in dp; expert e lives on ep = e // (experts / EP)

Launchers number ranks node by node, so the order of the global ranks decides what crosses nodes:

    pp_across_nodes   rank = pp · DP + dp     data-parallel (so EP) neighbours share a node, pipelines cross nodes
    ep_across_nodes   rank = dp · PP + pp     a pipeline stays in a node, EP groups cross nodes

Under a bidirectional schedule a stage lives on two PP ranks, its *mirrors*; under others on one. Copies of a
parameter are kept on
- dense parameters of a stage: all dp of the PP ranks that hold it;
- routed experts: those of them with the same ep.

`Layout` is arithmetic only and works for any world size without processes; `Mesh` makes the process groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from dualpipe.p2p import Links
from parallel.expert_groups import ExpertGroups, create_expert_groups

PP_ACROSS_NODES, EP_ACROSS_NODES = ORDERS = ("pp_across_nodes", "ep_across_nodes")


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh and the order of its ranks. Raises ValueError, naming the override, if they do not fit."""

    world: int
    pp: int
    ep: int
    order: str = PP_ACROSS_NODES

    def __post_init__(self) -> None:
        for name in ("pp", "ep"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        if self.order not in ORDERS:
            raise ValueError(f"parallel.order={self.order!r} is unknown; choose one of {', '.join(ORDERS)}")
        if self.world % self.pp:
            raise ValueError(
                f"{self.world} processes cannot be divided into pipelines of parallel.pp={self.pp}; start a "
                f"multiple of {self.pp} processes (torchrun --nproc-per-node) or change parallel.pp"
            )
        if self.dp % self.ep:
            raise ValueError(
                f"parallel.ep={self.ep} does not divide the {self.dp} data-parallel ranks "
                f"({self.world} processes / parallel.pp={self.pp}); change parallel.ep or the number of processes"
            )

    @property
    def dp(self) -> int:
        return self.world // self.pp

    @property
    def pp_outermost(self) -> bool:
        return self.order == PP_ACROSS_NODES

    def rank(self, pp: int, dp: int) -> int:
        return pp * self.dp + dp if self.pp_outermost else dp * self.pp + pp

    def pp_of(self, rank: int) -> int:
        return rank // self.dp if self.pp_outermost else rank % self.pp

    def dp_of(self, rank: int) -> int:
        return rank % self.dp if self.pp_outermost else rank // self.pp

    def ep_of(self, rank: int) -> int:
        return self.dp_of(rank) % self.ep

    def dp_per_node(self, ranks_per_node: int) -> int:
        """How many data-parallel neighbours of one PP rank share a node."""
        return ranks_per_node if self.pp_outermost else max(1, ranks_per_node // self.pp)

    def pipelines(self) -> list[list[int]]:
        """The global ranks of each pipeline, in PP order."""
        return [[self.rank(pp, dp) for pp in range(self.pp)] for dp in range(self.dp)]

    def expert_groups(self) -> list[list[int]]:
        """The ranks between which tokens are dispatched, in order of their experts."""
        return [
            [self.rank(pp, dp) for dp in range(start, start + self.ep)]
            for pp in range(self.pp)
            for start in range(0, self.dp, self.ep)
        ]

    def replicas(self, pp_ranks: Sequence[int], ep: int | None = None) -> list[int]:
        """The ranks that hold a copy of what the PP ranks hold: all of it, or the experts at position `ep`."""
        return sorted(self.rank(pp, dp) for pp in pp_ranks for dp in range(self.dp) if ep is None or dp % self.ep == ep)


@dataclass(frozen=True)
class Mesh:
    """This process's place in the layout, and the groups that it shares with others.

    expert    dispatch and combine; None for EP 1
    dense     copies of this rank's dense parameters; None if there is only one
    experts   copies of this rank's routed experts; None if there is only one
    links     the pipeline; None for PP 1
    control   gloo group of the whole world for small host-side values; None for one process
    tied      copies of the embedding, where it is also kept on another rank than its stage; else None
    """

    layout: Layout
    rank: int
    expert: ExpertGroups | None
    dense: dist.ProcessGroup | None
    experts: dist.ProcessGroup | None
    links: Links | None
    control: dist.ProcessGroup | None
    tied: dist.ProcessGroup | None = None

    @property
    def pp(self) -> int:
        return self.layout.pp_of(self.rank)

    @property
    def dp(self) -> int:
        return self.layout.dp_of(self.rank)

    @property
    def ep(self) -> int:
        return self.layout.ep_of(self.rank)

    @staticmethod
    def create(
        layout: Layout,
        mirrors: Sequence[Sequence[int]],
        timeout: timedelta,
        embedding: Sequence[int] = (),
        ranks_per_node: int | None = None,
        host_backend: str = "gloo",
    ) -> Mesh:
        """Make all groups. Collective: every process calls it with the same arguments.

        mirrors         the PP ranks that hold the same stages, e.g. [[0, 3], [1, 2]] for DualPipe on 4
        embedding       the PP ranks that hold the embedding, e.g. [0, 3] for 1F1B on 4 with MTP; () = stage 0's
        ranks_per_node  asks for expert groups inside and across nodes, for a dispatch that uses them
        host_backend    of the group for host-side values
        """
        if layout.world == 1:
            return Mesh(layout, 0, None, None, None, None, None)
        rank = dist.get_rank()
        neighbours = layout.dp_per_node(ranks_per_node) if ranks_per_node else None
        dense_groups = [layout.replicas(pps) for pps in mirrors]
        expert_copies = [layout.replicas(pps, ep) for pps in mirrors for ep in range(layout.ep)]
        is_tied = bool(embedding) and sorted(embedding) not in [sorted(pps) for pps in mirrors]
        return Mesh(
            layout=layout,
            rank=rank,
            expert=create_expert_groups(layout.expert_groups(), timeout, neighbours),
            dense=_my_group(dense_groups, rank, timeout),
            experts=_my_group(expert_copies, rank, timeout),
            links=Links.create(layout.pipelines(), timeout) if layout.pp > 1 else None,
            control=dist.new_group(backend=host_backend, timeout=timeout),
            tied=_my_group([layout.replicas(embedding)] if is_tied else [], rank, timeout),
        )


def _my_group(groups: Sequence[Sequence[int]], rank: int, timeout: timedelta) -> dist.ProcessGroup | None:
    """Make every group (all ranks must), return the one with this rank; groups of one need no communication."""
    mine = None
    for ranks in groups:
        if len(ranks) > 1:
            group = dist.new_group(list(ranks), timeout=timeout)
            if rank in ranks:
                mine = group
    return mine
