"""Where training puts its routed experts: in order, or so that the ranks share the load that was recorded.

Without copies, a placement is an order of the experts: position p belongs to rank p // (experts per rank). The loads
are those of the checkpoint that the run goes on from (training/balance.py writes them there), so every rank computes
the same order from the same file. It changes which rank computes what, and so the order of some sums: a run that is
placed anew is equal to one that was not up to rounding, not bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from model.config import ModelConfig
from parallel.placement import Plan, place_experts


@dataclass(frozen=True)
class ExpertOrder:
    """by_layer: the experts of each layer in order of their ranks; before, after: maximum over mean load per rank."""

    by_layer: Mapping[int, tuple[int, ...]]
    before: float
    after: float

    def __str__(self) -> str:
        return f"maximum over mean load per rank, worst layer: {self.before:.3f} in order, {self.after:.3f} placed"


def order_experts(config: ModelConfig, ep: int, recorded: Mapping[str, list[int]]) -> ExpertOrder | None:
    """The order for `ep` ranks from router counts by layer, whose first values are the loads.

    None if there is nothing to place by: one rank, no counts, or a layer without load keeps its order. Groups of
    experts stay together as far as the ranks allow, so that tokens visit no more nodes than before.
    """
    by_layer: dict[int, tuple[int, ...]] = {}
    before, after = 1.0, 1.0
    share = config.num_experts // ep
    nodes = gcd(ep, config.num_groups)
    in_order = Plan(tuple(tuple(range(r * share, (r + 1) * share)) for r in range(ep)))
    for index, counts in enumerate(recorded.values()):
        loads = counts[: config.num_experts]
        if ep == 1 or not any(loads):
            continue
        plan = place_experts(loads, config.num_experts, ep, nodes, config.num_groups)
        if plan.imbalance(loads) < in_order.imbalance(loads):
            by_layer[config.num_dense_layers + index] = tuple(e for rank in plan.ranks for e in rank)
        else:
            plan = in_order
        before, after = max(before, in_order.imbalance(loads)), max(after, plan.imbalance(loads))
    return ExpertOrder(by_layer, before, after) if by_layer else None
