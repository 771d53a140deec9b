"""Which messages a schedule implies: who sends what to whom, when a receive is posted, when a send is surely over.

Everything is derived from the schedule before the first step:

- F of stage s needs the activation from the rank that ran stage s-1; B and I the gradient from stage s+1. On one
  rank (the turn of a V) nothing travels.
- A receive is posted some steps before it is needed, so the data can arrive under compute. Per channel
  (source, destination, kind) receives are posted in the order in which the source sends, as NCCL demands.
- A send needs its buffer until the receiver has the data. Nobody should wait for that, and nobody has to: when a
  message arrives that could only be sent after ours was used, ours is over. Vector clocks over the schedule say
  after which of our steps that is so; what is left is waited for at the end.

Nobody waits for a W and a W waits for no message, so the plan hangs on the other steps only: the runtime may move
a W (`fill.py`) without a new plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from dualpipe.schedule import Action, Kind, Pair, Schedule, Step, parts
from dualpipe.validate import dependencies


class Cargo(StrEnum):
    ACTIVATION = "activation"
    GRADIENT = "gradient"

    __hash__ = str.__hash__


class Message(NamedTuple):
    """Cargo between `stage` (that computed it) and its neighbour, for one micro-batch, from PP rank to PP rank."""

    cargo: Cargo
    stage: int
    micro_batch: int
    source: int
    destination: int

    def __str__(self) -> str:
        route = f"PP rank {self.source} → {self.destination}"
        return f"{self.cargo} of stage {self.stage}, micro-batch {self.micro_batch} ({route})"


@dataclass(frozen=True)
class RankPlan:
    """One rank's messages.

    incoming, outgoing   what an action waits for and what its result goes out with; absent: it stays on the rank
    posts[step]          receives to post before a step
    releases[step]       sends that are surely over once the step has received what it needs
    """

    incoming: Mapping[Action, Message]
    outgoing: Mapping[Action, Message]
    posts: Mapping[Step, tuple[Message, ...]]
    releases: Mapping[Step, tuple[Message, ...]]


def incoming(schedule: Schedule, action: Action) -> Message | None:
    """The message that an action waits for, if any."""
    rank = schedule.rank_of(action.stage, action.micro_batch)
    if action.kind is Kind.F and action.stage > 0:
        cargo, stage = Cargo.ACTIVATION, action.stage - 1
    elif action.kind in (Kind.B, Kind.I) and action.stage < schedule.num_stages - 1:
        cargo, stage = Cargo.GRADIENT, action.stage + 1
    else:
        return None
    source = schedule.rank_of(stage, action.micro_batch)
    return None if source == rank else Message(cargo, stage, action.micro_batch, source, rank)


def outgoing(schedule: Schedule, action: Action) -> Message | None:
    """The message that an action's result goes out with, if any."""
    rank = schedule.rank_of(action.stage, action.micro_batch)
    if action.kind is Kind.F and action.stage < schedule.num_stages - 1:
        cargo, stage = Cargo.ACTIVATION, action.stage + 1
    elif action.kind in (Kind.B, Kind.I) and action.stage > 0:
        cargo, stage = Cargo.GRADIENT, action.stage - 1
    else:
        return None
    target = schedule.rank_of(stage, action.micro_batch)
    return None if target == rank else Message(cargo, action.stage, action.micro_batch, rank, target)


def plan_messages(schedule: Schedule, rank: int, look_ahead: int = 3, batch: int = 4) -> RankPlan:
    """Derive one rank's plan from a valid schedule.

    look_ahead   a receive is posted at least so many steps before it is needed, W not counted
    batch        receives are posted for so many steps at once: several in a row cost little more than one
    """
    actions = tuple(schedule.actions(rank))
    posts, releases = _posts(schedule, rank, look_ahead, batch), _releases(schedule, rank)
    same = {m: m for group in (*posts.values(), *releases.values()) for m in group}  # found by identity, not by fields
    return RankPlan(
        incoming={a: same.get(m, m) for a in actions if (m := incoming(schedule, a)) is not None},
        outgoing={a: same.get(m, m) for a in actions if (m := outgoing(schedule, a)) is not None},
        posts=posts,
        releases=releases,
    )


def _waits_for_nobody(step: Step) -> bool:
    return isinstance(step, Action) and step.kind is Kind.W


def _posts(schedule: Schedule, rank: int, look_ahead: int, batch: int) -> dict[Step, tuple[Message, ...]]:
    channels: dict[tuple[int, Cargo], list[Message]] = defaultdict(list)
    for source in range(schedule.num_ranks):
        for action in schedule.actions(source):
            message = outgoing(schedule, action)
            if message is not None and message.destination == rank:
                channels[source, message.cargo].append(message)
    row = [step for step in schedule.steps[rank] if not _waits_for_nobody(step)]
    needs = [[m for a in parts(step) if (m := incoming(schedule, a)) is not None] for step in row]
    result: dict[Step, tuple[Message, ...]] = {}
    for index in range(0, len(row), batch):
        posted: list[Message] = []
        for wanted in (m for some in needs[index : index + look_ahead + batch] for m in some):
            channel = channels[wanted.source, wanted.cargo]
            while wanted in channel:  # those before it in the channel come along
                posted.append(channel.pop(0))
        if posted:
            result[row[index]] = tuple(posted)
    return result


def _releases(schedule: Schedule, rank: int) -> dict[Step, tuple[Message, ...]]:
    clocks = vector_clocks(schedule)
    where = {a: (r, k) for r, row in enumerate(schedule.steps) for k, step in enumerate(row) for a in parts(step)}
    used: dict[Message, tuple[int, int]] = {}
    for action, place in where.items():
        message = incoming(schedule, action)
        if message is not None and message.source == rank:
            used[message] = place
    open_sends: list[Message] = []
    result: dict[Step, tuple[Message, ...]] = {}
    for index, step in enumerate(schedule.steps[rank]):
        if _waits_for_nobody(step):
            continue
        over = tuple(m for m in open_sends if clocks[rank][index][used[m][0]] >= used[m][1])
        if over:
            result[step] = over
            open_sends = [m for m in open_sends if m not in over]
        open_sends += [m for a in parts(step) if (m := outgoing(schedule, a)) is not None]
    return result


def vector_clocks(schedule: Schedule) -> list[list[list[int]]]:
    """clocks[rank][step][other] = the last step of `other` that is surely over when (rank, step) has its inputs.

    −1 stands for none. The result of a pair's one half may come before the other half has its input, so it proves
    only what stands before the pair.
    """
    ranks = range(schedule.num_ranks)
    where: dict[Action, tuple[int, int]] = {}
    clocks: list[list[list[int]]] = [[] for _ in ranks]
    progress = True
    while progress:
        progress = False
        for rank in ranks:
            row = schedule.steps[rank]
            while len(clocks[rank]) < len(row):
                index = len(clocks[rank])
                sources = _sources(schedule, row[index], where)
                if sources is None:
                    break
                clock = list(clocks[rank][-1]) if index else [-1] * len(ranks)
                for other, step in sources:
                    proven = step - isinstance(schedule.steps[other][step], Pair)
                    if other != rank and proven >= 0:
                        clock = [max(a, b) for a, b in zip(clock, clocks[other][proven], strict=True)]
                        clock[other] = max(clock[other], proven)
                clock[rank] = index - 1
                clocks[rank].append(clock)
                where.update(dict.fromkeys(parts(row[index]), (rank, index)))
                progress = True
    return clocks


def _sources(schedule: Schedule, step: Step, where: dict[Action, tuple[int, int]]) -> list[tuple[int, int]] | None:
    """Where the dependencies of a step ran, or None if one has not run yet."""
    found = []
    for action in parts(step):
        for alternatives in dependencies(schedule, action):
            places = [where[a] for a in alternatives if a in where]
            if not places:
                return None
            found.append(places[0])
    return found
