"""How many bytes a rank sends in one step, by what they are for, inside its node and between nodes.

    pipeline    activations and their gradients, to the neighbour stages
    experts     dispatch and combine, forward and backward; the few integers of the counts are left out
    gradients   the sum over the copies of a parameter, and with ZeRO-1 the new weights

Tokens are counted with the program's own routing rule on random scores, so experts are in balance. Sums over copies
are counted as a ring in the order of the ranks: (n − 1)/n of the bytes once for a reduce-scatter or a gather, twice
for an all-reduce. Figures are means over the data-parallel ranks of a pipeline rank: in a ring one rank of a node
sends to the next node and the others do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from dualpipe.schedule import Kind, Schedule, parts
from dualpipe.simulator import receiver
from model.config import ModelConfig
from model.fp8.quantize import TILE
from model.router import choose_experts
from parallel.buckets import GradBucket
from parallel.mesh import Layout
from parallel.packing import Columns
from parallel.routes import targets

SAMPLED_TOKENS = 4096


@dataclass(frozen=True)
class Bytes:
    """Sent by one rank."""

    inside: float = 0.0
    across: float = 0.0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.inside + other.inside, self.across + other.across)

    def __mul__(self, factor: float) -> Bytes:
        return Bytes(self.inside * factor, self.across * factor)


@dataclass(frozen=True)
class Traffic:
    """Of one rank and one step."""

    pipeline: Bytes
    experts: Bytes
    gradients: Bytes

    @property
    def total(self) -> Bytes:
        return self.pipeline + self.experts + self.gradients


@dataclass(frozen=True)
class Nodes:
    """Which rank is on which node."""

    layout: Layout
    ranks_per_node: int

    def split(self, edges: Iterable[tuple[int, int]]) -> Bytes:
        """The parts of edges (rank to rank) that stay in a node and that leave it: they add up to one, or to zero."""
        number = crossing = 0
        for source, target in edges:
            number += 1
            crossing += source // self.ranks_per_node != target // self.ranks_per_node
        return Bytes((number - crossing) / number, crossing / number) if number else Bytes()

    def split_all(self, groups: Sequence[Sequence[int]]) -> Bytes:
        """The same for all edges between different ranks of each group."""
        number = inside = 0
        for group in groups:
            seats = Counter(rank // self.ranks_per_node for rank in group)
            number += len(group) * (len(group) - 1)
            inside += sum(count * (count - 1) for count in seats.values())
        return Bytes(inside / number, (number - inside) / number) if number else Bytes()


@dataclass(frozen=True)
class Spread:
    """Over how many ranks and nodes of its EP group the experts of a token are, on average."""

    ranks: float
    nodes: float


def spread_of(config: ModelConfig, ep: int, local: int) -> Spread:
    """For an EP group with `local` ranks on each node, under random scores (the same every time)."""
    if ep == 1 or not config.num_moe_layers:
        return Spread(1.0, 1.0)
    scores = torch.rand(SAMPLED_TOKENS, config.num_experts, generator=torch.Generator().manual_seed(0))
    experts_TK = choose_experts(scores, config.num_groups, config.groups_per_token, config.experts_per_token)
    ranks_PT = targets(experts_TK, 0, config.num_experts // ep, ep)
    nodes_NT = ranks_PT.view(ep // local, local, -1).any(1) if ep % local == 0 else ranks_PT
    return Spread(float(ranks_PT.sum()) / SAMPLED_TOKENS, float(nodes_NT.sum()) / SAMPLED_TOKENS)


def pipeline_bytes(schedule: Schedule, pp: int, message: int, nodes: Nodes) -> Bytes:
    """What PP rank `pp` sends to its neighbours; a message is `message` bytes long."""
    total, layout = Bytes(), nodes.layout
    counts: dict[int, int] = {}
    for step in schedule.steps[pp]:
        for action in parts(step):
            target = receiver(schedule, action)
            if target is not None and target != pp:
                counts[target] = counts.get(target, 0) + 1
    for target, count in counts.items():
        edges = ((layout.rank(pp, dp), layout.rank(target, dp)) for dp in range(layout.dp))
        total += nodes.split(edges) * (count * message)
    return total


@dataclass(frozen=True)
class Tokens:
    """tokens per micro-batch, their width and type; `hierarchical`: across nodes first, then inside the node.

    fp8   they travel to their experts in FP8 (parallel/rows.py)
    """

    number: int
    hidden: int
    dtype: torch.dtype
    experts: int  # per token
    hierarchical: bool = False
    gates: torch.dtype = field(default=torch.float32)
    fp8: bool = False

    @property
    def bytes_per_row(self) -> int:
        """Of one row that goes there and back, in forward and in backward (parallel/dispatch.py)."""

        def row(*columns: tuple[int, torch.dtype]) -> int:
            return Columns(tuple(c[0] for c in columns), tuple(c[1] for c in columns)).starts[-1]

        hidden, gates = (self.hidden, self.dtype), (self.experts, self.gates)
        there = [(self.hidden, torch.uint8), (-(-self.hidden // TILE), torch.uint8)] if self.fp8 else [hidden]
        forward = row(*there, gates, (self.experts, torch.int32)) + row(hidden)
        return forward + row(*there) + row(hidden, gates)


def expert_bytes(
    schedule: Schedule, pp: int, moe_layers: Mapping[int, int], tokens: Tokens, nodes: Nodes, spread: Spread
) -> Bytes:
    """What a rank of PP rank `pp` sends to its EP group; moe_layers[s] is the number of MoE layers of stage s."""
    layout = nodes.layout
    layers = sum(moe_layers[a.stage] for a in schedule.actions(pp) if a.kind is Kind.F)
    if tokens.hierarchical:
        local = max(1, min(layout.ep, layout.dp_per_node(nodes.ranks_per_node)))
        number = layout.ep // local
        rows = Bytes(spread.ranks * (local - 1) / local, spread.nodes * (number - 1) / number)
    else:
        groups = [group for group in layout.expert_groups() if layout.pp_of(group[0]) == pp]
        rows = nodes.split_all(groups) * (spread.ranks * (layout.ep - 1) / layout.ep)
    return rows * (layers * tokens.number * tokens.bytes_per_row)


def gradient_bytes(buckets: Sequence[GradBucket], zero: int, nodes: Nodes) -> Bytes:
    """What a rank with these buckets sends when gradients are summed and, with ZeRO-1, weights gathered."""
    total = Bytes()
    for bucket in buckets:
        if bucket.group is None:
            continue
        ranks = dist.get_process_group_ranks(bucket.group)
        ring = nodes.split(zip(ranks, [*ranks[1:], ranks[0]], strict=True))
        size = bucket.grads.numel()
        there = size * bucket.grads.element_size()
        back = size * bucket.dtype.itemsize if zero else there
        total += ring * ((there + back) * (bucket.copies - 1) / bucket.copies)
    return total
