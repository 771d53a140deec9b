"""Expert parallelism: tokens travel to their experts and back.

Backend `all_to_all`, for any torch.distributed backend. A token that has several experts on one rank travels there
once, with the list of its experts and gates; the receiver makes one row per (token, expert), sorted by expert. On
the way back the receiver adds up a token's rows, so again one row per token and rank travels. Splits are uneven,
and any of them may be zero.

    dispatch   counts (blocking, EP integers) · tokens, experts, gates (asynchronous)
    combine    sums of weighted expert outputs (asynchronous)

Each has its backward: gradients take the same routes in the opposite direction. With one rank nothing travels and
the same code runs on the local rows.

Shapes: T local tokens, K experts per token, N tokens sent (one per token and rank), M tokens received, R expert
rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.protocols import Exchange


@dataclass(frozen=True)
class Plan:
    """The routes of one micro-batch through one layer.

    token_N, slots_NK   per sent row: its token, and the experts on that rank (-1: slot of another rank)
    sent, received      rows to and from each rank
    source_R, slot_R    per expert row: the received row, and the slot of its gate
    """

    num_tokens: int
    token_N: Tensor
    slots_NK: Tensor
    sent: list[int]
    received: list[int]
    source_R: Tensor
    slot_R: Tensor


class AllToAllDispatcher:
    """Opens exchanges over a group of EP ranks (None: one rank), each with `experts_per_rank` experts."""

    def __init__(self, group: dist.ProcessGroup | None, experts_per_rank: int) -> None:
        self.group = group
        self.ranks = group.size() if group is not None else 1
        self.experts_per_rank = experts_per_rank

    def open(self) -> Exchange:
        route = _Route(self)
        return Exchange(_Dispatch(route), _Combine(route))

    def exchange_counts(self, sent: Tensor) -> list[int]:
        if self.group is None:
            return sent.tolist()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received.tolist()

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Transfer:
        """Start sending blocks of rows; block r goes to rank r."""
        if self.group is None:
            return Transfer(rows, None, rows)
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        work = dist.all_to_all_single(out, rows.contiguous(), received, sent, group=self.group, async_op=True)
        return Transfer(out, work, rows)


@dataclass(frozen=True)
class Transfer:
    """Rows under way; keeps what is being sent alive."""

    rows: Tensor
    work: Any
    sending: Tensor

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.rows


class Promise:
    """A Pending whose result is made by a function when it is waited for."""

    def __init__(self, finish: Callable[[], tuple[Any, ...]]) -> None:
        self._finish = finish

    def wait(self) -> tuple[Any, ...]:
        return self._finish()


class _Route:
    """What dispatch and combine of one exchange share: the plan, made by dispatch."""

    def __init__(self, dispatcher: AllToAllDispatcher) -> None:
        self.dispatcher = dispatcher
        self.plan: Plan | None = None

    @property
    def known(self) -> Plan:
        if self.plan is None:
            raise RuntimeError("combine, or a backward, was asked for before dispatch has finished")
        return self.plan

    def scatter(self, rows_RD: Tensor) -> Transfer:
        """Send each expert row's contribution home: added per received token, one row per token and rank."""
        plan = self.known
        summed = rows_RD.new_zeros(sum(plan.received), rows_RD.shape[1]).index_add_(0, plan.source_R, rows_RD)
        return self.dispatcher.exchange(summed, plan.received, plan.sent)

    def gather_home(self, rows_ND: Tensor) -> Tensor:
        plan = self.known
        return rows_ND.new_zeros(plan.num_tokens, rows_ND.shape[1]).index_add_(0, plan.token_N, rows_ND)


class _Dispatch:
    def __init__(self, route: _Route) -> None:
        self.route = route

    def start(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> Promise:
        dispatcher = self.route.dispatcher
        token_N, slots_NK, sent = route_tokens(experts_TK, dispatcher.ranks, dispatcher.experts_per_rank)
        received = dispatcher.exchange_counts(sent)
        counts = sent.tolist()
        transfers = [
            dispatcher.exchange(rows, counts, received) for rows in (slots_NK, gates_TK[token_N], x_TD[token_N])
        ]

        def finish() -> tuple[Tensor, Tensor, list[int]]:
            arrived_MK, gates_MK, x_MD = (t.wait() for t in transfers)
            source_R, slot_R, per_expert = sort_by_expert(arrived_MK, dispatcher.experts_per_rank)
            self.route.plan = Plan(len(x_TD), token_N, slots_NK, counts, received, source_R, slot_R)
            return x_MD[source_R], gates_MK[source_R, slot_R], per_expert

        return Promise(finish)

    def start_backward(self, dx_RD: Tensor, dgates_R: Tensor, _: None) -> Promise:
        route, plan = self.route, self.route.known
        dgates_MK = dgates_R.new_zeros(sum(plan.received), plan.slots_NK.shape[1])
        dgates_MK[plan.source_R, plan.slot_R] = dgates_R
        transfers = (route.scatter(dx_RD), route.dispatcher.exchange(dgates_MK, plan.received, plan.sent))
        return Promise(lambda: (*(route.gather_home(t.wait()) for t in transfers), None))


class _Combine:
    def __init__(self, route: _Route) -> None:
        self.route = route

    def start(self, y_RD: Tensor) -> Promise:
        transfer = self.route.scatter(y_RD)
        return Promise(lambda: (self.route.gather_home(transfer.wait()),))

    def start_backward(self, dy_TD: Tensor) -> Promise:
        plan = self.route.known
        rows = dy_TD.flatten(0, -2)[plan.token_N]
        transfer = self.route.dispatcher.exchange(rows, plan.sent, plan.received)
        return Promise(lambda: (transfer.wait()[plan.source_R],))


def route_tokens(experts_TK: Tensor, ranks: int, experts_per_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens go to which rank.

    Returns token_N and slots_NK, sorted by rank and then by token, and the number of rows for each rank. A slot
    holds the expert's number on its rank, or -1 if that expert lives elsewhere.
    """
    rank_TK = experts_TK // experts_per_rank
    wanted_RT = torch.zeros(ranks, len(experts_TK), dtype=torch.bool, device=experts_TK.device)
    wanted_RT.scatter_(0, rank_TK.t(), True)
    rank_N, token_N = wanted_RT.nonzero(as_tuple=True)
    here_NK = rank_TK[token_N] == rank_N.unsqueeze(1)
    slots_NK = (experts_TK[token_N] % experts_per_rank).masked_fill(~here_NK, -1)
    return token_N, slots_NK, wanted_RT.sum(1)


def sort_by_expert(slots_MK: Tensor, experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """One row per (received token, local expert), sorted by expert: its received row, its slot, rows per expert."""
    row, slot = (slots_MK >= 0).nonzero(as_tuple=True)
    expert = slots_MK[row, slot]
    order = expert.argsort(stable=True)
    counts = torch.bincount(expert, minlength=experts)
    return row[order], slot[order], counts.tolist()
