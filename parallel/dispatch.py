"""Expert parallelism: tokens travel to their experts and back.

A token that has several experts behind one hop travels there once, with the list of its experts and gates; the last
receiver makes one row per (token, expert), sorted by expert. On the way back every receiver adds up a token's rows, so
again one row per token and rank travels. All columns of a row go in one message. Splits are uneven, and any of them
may be zero.

    counts     sizes of everything (asynchronous, a few integers per rank)
    dispatch   tokens, gates, experts (asynchronous)
    combine    sums of weighted expert outputs (asynchronous)

Each of the two has its backward: gradients take the same routes in the opposite direction. `routes.py` has the hops.
With two of them (`hierarchical`) the second starts when the first is waited for, on a CPU; it stays inside the node.

Shapes: T local tokens, K experts per token, M rows received at last, R expert rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.protocols import Exchange
from parallel.exchange import Works, all_to_all
from parallel.expert_groups import ExpertGroups
from parallel.packing import Columns
from parallel.routes import Place, Sizes, count_table, rows_for, sort_by_expert, targets
from parallel.rows import PlainRows, Rows


class Promise:
    """A Pending whose result is made by a function when it is waited for."""

    def __init__(self, finish: Callable[[], tuple[Any, ...]]) -> None:
        self._finish = finish

    def wait(self) -> tuple[Any, ...]:
        return self._finish()


@dataclass(frozen=True)
class Transfer:
    """Columns of rows under way; keeps what is being sent alive."""

    layout: Columns
    arriving: Tensor
    sending: Tensor
    work: Works

    def wait(self) -> tuple[Tensor, ...]:
        self.work.wait()
        return self.layout.unpack(self.arriving)


@dataclass(frozen=True)
class Hop:
    """One all-to-all of a micro-batch: sent row n copies row index_N[n] of the `rows` that are here."""

    group: dist.ProcessGroup
    index_N: Tensor
    rows: int
    sent: list[int]
    received: list[int]

    def there(self, columns: Sequence[Tensor]) -> Transfer:
        """Send the rows that travel, of columns [rows, ...]; what arrives is [sum(received), ...]."""
        layout = Columns.of(columns)
        return self._exchange(layout, layout.pack(columns, self.index_N), self.sent, self.received)

    def back(self, columns: Sequence[Tensor]) -> Transfer:
        """Send one row for each that was received, home."""
        layout = Columns.of(columns)
        return self._exchange(layout, layout.pack(columns), self.received, self.sent)

    def add(self, columns: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Add up what came home: [rows, ...]."""
        return tuple(c.new_zeros(self.rows, c.shape[1]).index_add_(0, self.index_N, c) for c in columns)

    def _exchange(self, layout: Columns, block: Tensor, sent: list[int], received: list[int]) -> Transfer:
        arriving = layout.block(sum(received), block.device)
        work = all_to_all(arriving, block, received, sent, self.group)
        return Transfer(layout, arriving, block, work)


@dataclass(frozen=True)
class Route:
    """All hops of a micro-batch through one layer; then expert row r is received row source_R[r], gate slot_R[r].

    `received` is (M, K).
    """

    hops: tuple[Hop, ...]
    received: tuple[int, ...]
    source_R: Tensor
    slot_R: Tensor

    def there(self, columns: Sequence[Tensor]) -> Promise:
        """From tokens to expert rows, along hops that are known."""
        first = self.hops[0].there(columns) if self.hops else None

        def finish() -> tuple[Tensor, ...]:
            arrived = tuple(columns) if first is None else first.wait()
            for hop in self.hops[1:]:
                arrived = hop.there(arrived).wait()
            return tuple(c.index_select(0, self.source_R) for c in arrived)

        return Promise(finish)

    def back(self, columns: Sequence[Tensor]) -> Promise:
        """From received rows to tokens, added up at every hop."""
        first = self.hops[-1].back(columns) if self.hops else None

        def finish() -> tuple[Tensor, ...]:
            if first is None:
                return tuple(columns)
            arrived = self.hops[-1].add(first.wait())
            for hop in reversed(self.hops[:-1]):
                arrived = hop.add(hop.back(arrived).wait())
            return arrived

        return Promise(finish)

    def gather(self, rows_RD: Tensor) -> Tensor:
        """The sum of each received row's expert rows: [M, D]."""
        return rows_RD.new_zeros(self.received[0], rows_RD.shape[1]).index_add_(0, self.source_R, rows_RD)


class RoutedDispatcher:
    """Opens exchanges over an EP group (None: one rank), each rank of which holds `experts_per_rank` experts.

    rows   how vectors travel on their way to the experts
    """

    def __init__(self, groups: ExpertGroups | None, experts_per_rank: int, rows: Rows | None = None) -> None:
        self.groups = groups
        self.rows: Rows = PlainRows() if rows is None or groups is None else rows
        if groups is None:
            self.place = Place(0, 1, 1, experts_per_rank)
        else:
            self.place = Place(groups.position, groups.nodes, groups.local, experts_per_rank)

    def open(self) -> Exchange:
        counts = RoutedCounts(self)
        dispatch = RoutedDispatch(self)
        return Exchange(counts, dispatch, _Combine(dispatch))

    def hop_groups(self) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """The groups of the first and second hop; None if that hop has one rank."""
        groups = self.groups
        if groups is None:
            return None, None
        return (groups.whole, None) if groups.local == 1 else (groups.rail, groups.node)


class RoutedCounts:
    start_backward = None

    def __init__(self, dispatcher: RoutedDispatcher) -> None:
        self.dispatcher = dispatcher

    def start(self, experts_TK: Tensor) -> Promise:
        """Promises (table,): [2, P, ...], what this rank sent and what it received."""
        sent = count_table(experts_TK, self.dispatcher.place)
        groups = self.dispatcher.groups
        if groups is None:
            return Promise(lambda: (torch.stack((sent, sent)),))
        received = torch.empty_like(sent)
        ones = [1] * groups.size
        work = all_to_all(received, sent, ones, ones, groups.counts)

        def finish() -> tuple[Tensor]:
            work.wait()
            return (torch.stack((sent, received)),)

        return Promise(finish)


class RoutedDispatch:
    def __init__(self, dispatcher: RoutedDispatcher) -> None:
        self.dispatcher = dispatcher
        self._route: Route | None = None

    @property
    def route(self) -> Route:
        if self._route is None:
            raise RuntimeError("combine, or a backward, was asked for before dispatch has finished")
        return self._route

    def start(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor, table: Tensor) -> Promise:
        place = self.dispatcher.place
        across, inside = self.dispatcher.hop_groups()
        sent, received = table.tolist()
        sizes = Sizes.read(sent, received, place)
        rows = self.dispatcher.rows
        columns: tuple[Tensor, ...] = (*rows.pack(x_TD), gates_TK, experts_TK.to(torch.int32))
        hops: list[Hop] = []
        first = None
        if across is not None:
            hops.append(_hop(across, experts_TK, 0, place.share * place.local, sizes, 0))
            first = hops[0].there(columns)

        def finish() -> tuple[Any, ...]:
            arrived = columns if first is None else first.wait()
            if inside is not None:
                start = place.node * place.local * place.share
                hops.append(_hop(inside, arrived[-1], start, place.share, sizes, 1))
                arrived = hops[-1].there(arrived).wait()
            *vectors_M, gates_MK, experts_MK = arrived
            source_R, slot_R = sort_by_expert(experts_MK, place, sum(sizes.per_expert))
            self._route = Route(tuple(hops), experts_MK.shape, source_R, slot_R)
            x_RD = rows.unpack([column.index_select(0, source_R) for column in vectors_M])
            return x_RD, gates_MK[source_R, slot_R], sizes.per_expert

        return Promise(finish)

    def start_backward(self, dx_RD: Tensor, dgates_R: Tensor, _: None) -> Promise:
        route = self.route
        dgates_MK = dgates_R.new_zeros(route.received)
        dgates_MK[route.source_R, route.slot_R] = dgates_R
        pending = route.back((route.gather(dx_RD), dgates_MK))
        return Promise(lambda: (*pending.wait(), None, None))


class _Combine:
    def __init__(self, dispatch: RoutedDispatch) -> None:
        self.dispatch = dispatch

    def start(self, y_RD: Tensor) -> Promise:
        route = self.dispatch.route
        return route.back((route.gather(y_RD),))

    def start_backward(self, dy_TD: Tensor) -> Promise:
        rows = self.dispatch.dispatcher.rows
        pending = self.dispatch.route.there(rows.pack(dy_TD.flatten(0, -2)))
        return Promise(lambda: (rows.unpack(pending.wait()),))


def _hop(group: dist.ProcessGroup, experts_MK: Tensor, first: int, share: int, sizes: Sizes, number: int) -> Hop:
    sent, received = sizes.sent[number], sizes.received[number]
    wanted = targets(experts_MK, first, share, len(sent))
    return Hop(group, rows_for(wanted, sum(sent)), len(experts_MK), sent, received)
