"""The plan of messages: who sends what, in which order receives stand, and nothing is let go before it was used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import pytest
import torch
from torch import Tensor

from benchmarks.schedule_runtime import EmulatedStage
from dualpipe.messages import Message, RankPlan, incoming, plan_messages
from dualpipe.p2p import P2P, Links
from dualpipe.runtime import Runtime
from dualpipe.schedule import Action, Schedule, parts
from dualpipe.schedules import SCHEDULES, make_schedule
from dualpipe.validate import dependencies
from dualpipe.wgrad import WeightGradQueue
from tests.spawn import run_ranks

CASES = [(name, ranks, 2 * ranks + 2) for name in sorted(SCHEDULES) for ranks in (1, 2, 4)]


def plans(schedule: Schedule) -> list[RankPlan]:
    return [plan_messages(schedule, rank) for rank in range(schedule.num_ranks)]


@pytest.mark.parametrize(("name", "ranks", "num"), CASES)
def test_what_is_sent_is_posted_once_before_it_is_needed_and_in_the_order_of_sending(
    name: str, ranks: int, num: int
) -> None:
    schedule = make_schedule(name, ranks, num)
    found = plans(schedule)
    sent = [message for plan in found for message in plan.outgoing.values()]
    posted = [message for plan in found for some in plan.posts.values() for message in some]
    assert Counter(sent) == Counter(posted)
    assert max(Counter(sent).values(), default=1) == 1
    for rank, plan in enumerate(found):
        there: set[Message] = set()
        for step in schedule.steps[rank]:
            there.update(plan.posts.get(step, ()))
            assert {plan.incoming[a] for a in parts(step) if a in plan.incoming} <= there
        arriving = [message for step in schedule.steps[rank] for message in plan.posts.get(step, ())]
        for source in range(ranks):
            leaving = [found[source].outgoing.get(a) for a in schedule.actions(source)]
            for cargo in ("activation", "gradient"):
                wanted = [m for m in leaving if m is not None and m.destination == rank and m.cargo == cargo]
                assert [m for m in arriving if m.source == source and m.cargo == cargo] == wanted


def reached(schedule: Schedule, rank: int, never: Action) -> int:
    """How many steps a rank can finish if one action is never done anywhere and halves of pairs run in any order."""
    done: set[Action] = set()
    position = [0] * schedule.num_ranks
    progress = True
    while progress:
        progress = False
        for r, row in enumerate(schedule.steps):
            while position[r] < len(row):
                for action in parts(row[position[r]]):
                    ready = all(any(a in done for a in some) for some in dependencies(schedule, action))
                    if action not in done and action != never and ready:
                        done.add(action)
                        progress = True
                if not done.issuperset(parts(row[position[r]])):
                    break
                position[r] += 1
    return position[rank]


@pytest.mark.parametrize(("name", "ranks", "num"), CASES)
def test_a_send_is_let_go_only_after_its_reader_has_surely_run(name: str, ranks: int, num: int) -> None:
    schedule = make_schedule(name, ranks, num)
    readers = {m: a for r in range(ranks) for a in schedule.actions(r) if (m := incoming(schedule, a)) is not None}
    released = 0
    for rank, plan in enumerate(plans(schedule)):
        place = {step: index for index, step in enumerate(schedule.steps[rank])}
        for step, messages in plan.releases.items():
            for message in messages:
                assert reached(schedule, rank, readers[message]) <= place[step]
                released += 1
    if ranks > 1 and name != "gpipe":
        assert released > 0


class Counting(P2P):
    """Messages that count how many sends are held at most."""

    most = 0

    def _send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        super()._send(message, tensors)
        self.most = max(self.most, len(self._sends))


def held_sends(rank: int, world: int) -> tuple[int, int]:
    """A rank's sends at once: as many as were held, and as the plan allows."""
    schedule, timeout = make_schedule("zbv", world, 20), timedelta(seconds=30)
    links, queue = Links.create([range(world)], timeout), WeightGradQueue()
    transport = Counting(links, torch.device("cpu"), timeout)
    last = schedule.num_stages - 1
    stages = {s: EmulatedStage(0.0, queue, s == 0, s == last) for s in schedule.stages_of(rank)}
    Runtime(stages, schedule, rank, links, queue, transport=transport, fill=False).step([torch.zeros(1, 4096)] * 20)
    plan, held, most = plan_messages(schedule, rank), 0, 0
    for step in schedule.steps[rank]:
        held += sum(action in plan.outgoing for action in parts(step))
        most = max(most, held)
        held -= len(plan.releases.get(step, ()))
    return transport.most, most


def test_sends_that_are_over_are_let_go_during_the_step() -> None:
    for held, planned in run_ranks(2, held_sends):
        assert held <= planned < 20
