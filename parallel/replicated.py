"""Expert dispatch for serving: experts may have copies, and what a token gets does not depend on which one it meets.

Counts and dispatch are those of training (`dispatch.py`), with slots in the place of experts: a token travels once to
each rank that computes for it. Combine differs. In training a rank adds up its experts' results for a token before
they travel home, so the order of the sum follows from the placement. Here every result travels by itself, and home
adds up a token's results in the order of its choice. So other placements, copies and ranks give the same bits, as long
as an expert gives the same ones wherever it is (serving/hosted_experts.py sees to that). It costs K rows per token on
the way back instead of one per rank; DeepEP's low-latency kernels do the same.

Forward only. Tokens take one hop.

Shapes: T local tokens, K experts per token, M rows received, R expert rows, D hidden size, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model.protocols import Exchange, Pending
from parallel.copies import CopyTable
from parallel.dispatch import Promise, RoutedDispatch, RoutedDispatcher
from parallel.exchange import all_to_all
from parallel.expert_groups import ExpertGroups
from parallel.rows import Rows


class ReplicatedDispatcher:
    """Of one layer.

    table    where its experts are; may be set anew between two batches, on all ranks between the same two
    active   dynamic redundancy: so many experts of a rank, at most, are used for a batch (0: all copies). Costs one
             more small exchange, which the others of the batch wait for
    """

    def __init__(
        self, groups: ExpertGroups | None, table: CopyTable, rows: Rows | None = None, active: int = 0
    ) -> None:
        self.groups, self.table, self.rows, self.active = groups, table, rows, active
        self.position = 0 if groups is None else groups.position

    def open(self) -> Exchange:
        routed = RoutedDispatcher(self.groups, self.table.per_rank, self.rows)
        way = _Way(self)
        inner = routed.open()
        assert isinstance(inner.dispatch, RoutedDispatch)
        return Exchange(_Counts(way, inner), _Dispatch(way, inner), _Combine(way, inner.dispatch))

    def table_for(self, experts_TK: Tensor) -> CopyTable:
        """The copies that are used for a batch. With dynamic redundancy a collective."""
        if not self.active or self.groups is None:
            return self.table
        counts_E = torch.bincount(experts_TK.flatten(), minlength=len(self.table.copies_E))
        return self.table.narrowed(everywhere(counts_E, self.groups.counts).sum(0).tolist(), self.active)


def everywhere(row: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Everybody's row: [W] → [P, W]. Every rank hears from every other directly, so all notice one that is gone."""
    if group is None:
        return row.unsqueeze(0)
    ones = [1] * group.size()
    block = row.unsqueeze(0).expand(group.size(), -1).contiguous()
    out = torch.empty_like(block)
    all_to_all(out, block, ones, ones, group).wait()
    return out


@dataclass
class _Way:
    """What the three operations of a batch tell each other.

    slots_TK   the copies that were chosen
    sizes      [2, P, …]: the tables of rows that this rank sends, and receives
    """

    dispatcher: ReplicatedDispatcher
    slots_TK: Tensor | None = None
    sizes: Tensor | None = None

    @property
    def chosen(self) -> tuple[Tensor, Tensor]:
        if self.slots_TK is None or self.sizes is None:
            raise RuntimeError("dispatch was asked for before counts, or combine before dispatch")
        return self.slots_TK, self.sizes


@dataclass(frozen=True)
class _Counts:
    way: _Way
    inner: Exchange
    start_backward: Callable[..., Pending] | None = None

    def start(self, experts_TK: Tensor) -> Pending:
        dispatcher = self.way.dispatcher
        self.way.slots_TK = dispatcher.table_for(experts_TK).spread(experts_TK, dispatcher.position)
        return self.inner.counts.start(self.way.slots_TK)


@dataclass(frozen=True)
class _Dispatch:
    way: _Way
    inner: Exchange
    start_backward: Callable[..., Pending] | None = None

    def start(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor, sizes: Tensor) -> Pending:
        self.way.sizes = sizes
        slots_TK, _ = self.way.chosen
        return self.inner.dispatch.start(x_TD, gates_TK, slots_TK, sizes)


@dataclass(frozen=True)
class _Combine:
    way: _Way
    routed: RoutedDispatch
    start_backward: Callable[..., Pending] | None = None

    def start(self, y_RD: Tensor) -> Pending:
        """Promises (y_TD,), added up in the order of each token's experts."""
        slots_TK, sizes = self.way.chosen
        groups, route = self.way.dispatcher.groups, self.routed.route
        by_source_R = (route.source_R * slots_TK.shape[1] + route.slot_R).argsort()
        leaving_RD = y_RD.index_select(0, by_source_R)
        homes_N = torch.div(slots_TK.flatten(), self.way.dispatcher.table.per_rank, rounding_mode="floor").argsort(
            stable=True
        )
        if groups is None:
            return Promise(lambda: (_add_up(leaving_RD, homes_N, slots_TK),))
        per_rank = sizes[:, :, 1 + self.routed.dispatcher.place.local :].sum(-1)
        coming, going = per_rank.tolist()
        arriving_ND = y_RD.new_empty(slots_TK.numel(), y_RD.shape[1])
        work = all_to_all(arriving_ND, leaving_RD, coming, going, groups.whole)

        def finish() -> tuple[Tensor]:
            work.wait()
            return (_add_up(arriving_ND, homes_N, slots_TK),)

        return Promise(finish)


def _add_up(rows_ND: Tensor, homes_N: Tensor, slots_TK: Tensor) -> Tensor:
    """Rows that came rank by rank, each for entry homes_N of the flattened choice: their sums [T, D]."""
    by_choice = torch.empty_like(rows_ND)
    by_choice[homes_N] = rows_ND
    return by_choice.view(*slots_TK.shape, rows_ND.shape[1]).sum(1)
