"""What the pipeline's runtime costs: measured makespan ÷ the schedule's own, beside torch.distributed.pipelining.

    .venv/bin/python -m benchmarks.schedule_runtime [--ranks 2 4 8] [--steps 7] [--delay 0.002]

An emulated device makes the overhead visible on two cores: a stage's F, I and W are timed sleeps (10 ms each; a pair
takes F + B), so ranks do not compete for the processor, while autograd, messages (real ones, over gloo) and all of the
runtime's own work are real. Both runtimes run the same autograd function, in the same processes, in turns. PyTorch's
stages get W through its own `dw_builder`, so it too pays no second walk of the graph.

A sleep costs more than was asked for. It lasts longer: measured between the steps, with all ranks sleeping at once
and nothing else (`as long as sleeps last`). The processor that wakes up is cold: the code after a sleep of 10 ms takes
several times as long as it takes without the sleep, which no kernel on a real device does to its host. Both together
are measured too, without any pipeline and in turns with the steps: F, I and W of as many micro-batches under plain
autograd, all processes at once, with sleeps minus without (`what sleeps cost`). And all of that scatters (`as they cost
one by one`). The stage's own autograd stays in what is measured, as does all of the runtime's code. The theoretical
makespan is given by all three accounts (sleeps.py).
PyTorch's makespan is held against its own order of actions.
Ours sends a gradient as soon as I is over and may so be faster than the published makespan; `early` is a simulation
that does the same. Only the seconds compare the two runtimes.

A third peer is the least that could run these orders: a bare loop without autograd, in which a rank sleeps, sends and
waits, with receives posted as early as ours. What it takes is the emulated device, the messages and a cold processor.

The second table adds a delay to every message inside the emulated link, and compares with the simulator's prediction.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV, ScheduleZBVZeroBubble

from benchmarks.report import Row, publish
from benchmarks.sleeps import Sleeping, Trio
from dualpipe.csvio import read_csv
from dualpipe.messages import Message, plan_messages
from dualpipe.p2p import P2P, Links
from dualpipe.runtime import Runtime
from dualpipe.schedule import Kind, Schedule, parts
from dualpipe.schedules import make_schedule
from dualpipe.stage import Segment, TensorSpec, compute
from dualpipe.wgrad import WeightGradQueue
from tests.spawn import run_ranks

SCHEDULES = ("dualpipe", "dualpipev", "one_f_one_b", "zbv")
PYTORCH = {"dualpipev": ScheduleDualPipeV, "one_f_one_b": Schedule1F1B, "zbv": ScheduleZBVZeroBubble}
SHAPE = (1, 4096)
TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Plan:
    """What to run: F, I and W each last `unit` seconds, a message `delay` longer than it takes."""

    schedules: tuple[str, ...]
    micro_batches: int
    unit: float
    steps: int
    delay: float


def work(unit: float) -> None:
    """What the emulated device does; 0 leaves it out, since even a sleep of no length lasts 0.07 ms."""
    if unit:
        time.sleep(unit)


class Sleep(torch.autograd.Function):
    """A stage's work: F in forward, I in backward, which puts W aside."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, unit: float, defer: Callable[[Callable[[], None]], None]
    ) -> Tensor:
        work(unit)
        ctx.unit, ctx.defer = unit, defer
        return x + 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        work(ctx.unit)
        ctx.defer(partial(work, ctx.unit))
        return grad, None, None, None


class EmulatedStage:
    """For our runtime: one segment."""

    def __init__(self, unit: float, queue: WeightGradQueue, is_first: bool, is_last: bool) -> None:
        self.spec = (TensorSpec(SHAPE, torch.float32),)
        self.unit, self.queue, self.is_first, self.is_last = unit, queue, is_first, is_last
        self.weight = torch.ones(1, requires_grad=True)

    def input_spec(self, micro_batch: Tensor) -> tuple[TensorSpec, ...]:
        return () if self.is_first else self.spec

    def output_spec(self, micro_batch: Tensor) -> tuple[TensorSpec, ...]:
        return () if self.is_last else self.spec

    def segments(self, micro_batch: Tensor) -> Sequence[Segment]:
        def run(*received: Tensor) -> Tensor:
            out = Sleep.apply(received[0] if received else micro_batch, self.weight, self.unit, self.queue.put)
            return out.mean() if self.is_last else out

        return (compute("sleep", () if self.is_first else ("in0",), ("out0",), run),)


class EmulatedModule(nn.Module):
    """For PyTorch's runtime: the same work; `take` hands W over to its stage."""

    def __init__(self, unit: float) -> None:
        super().__init__()
        self.unit = unit
        self.weight = nn.Parameter(torch.ones(1))
        self._last: Callable[[], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return Sleep.apply(x, self.weight, self.unit, self._keep)

    def _keep(self, work: Callable[[], None]) -> None:
        self._last = work

    def take(self) -> Callable[[], None]:
        assert self._last is not None
        return self._last


class DelayedLink(P2P):
    """A link on which a message arrives `delay` seconds after it was sent: it carries the time of its sending."""

    STAMP = TensorSpec((1,), torch.float64)

    def __init__(self, links: Links, delay: float) -> None:
        super().__init__(links, torch.device("cpu"), TIMEOUT)
        self.delay = delay

    def post(self, message: Message, specs: Sequence[TensorSpec]) -> None:
        super().post(message, (*specs, self.STAMP))

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        super().send(message, (*tensors, torch.tensor([time.perf_counter()], dtype=torch.float64)))

    def receive(self, message: Message) -> tuple[Tensor, ...]:
        *tensors, sent = super().receive(message)
        time.sleep(max(0.0, float(sent) + self.delay - time.perf_counter()))
        return tuple(tensors)


Timed = tuple[float, float]


def measure(rank: int, world: int, plan: Plan) -> dict[str, Any]:
    """One rank of all runs. Returns per schedule how long sleeps last and F, I and W take without a pipeline, per run
    the (start, end) of each step, and PyTorch's orders.

    `warm` is `alone` without its sleeps, on no more ranks than there are cores.
    """
    links = Links.create([range(world)], TIMEOUT)
    computes = rank < (psutil.cpu_count() or 1)
    result: dict[str, Any] = {"sleeps": {}, "trios": {}, "times": {}, "orders": {}}
    for name in plan.schedules:
        schedule = make_schedule(name, world, plan.micro_batches)
        lasts, trios = result["sleeps"][name], result["trios"][name] = [], []
        runs = {("ours", name): our_step(schedule, rank, links, plan, 0.0)}
        runs["bare", name] = bare_step(schedule, rank, links, plan)
        if name in PYTORCH:
            runs["pytorch", name], result["orders"][name] = pytorch_step(name, rank, world, plan)
        if plan.delay:
            runs["delayed", name] = our_step(schedule, rank, links, plan, plan.delay)
        runs["alone", name] = partial(no_pipeline, plan, trios)
        runs["warm", name] = partial(no_pipeline, replace(plan, unit=0.0), []) if computes else lambda: None
        for key, step in runs.items():
            step()
            result["times"][key] = []
        trios.clear()  # the first round is no measurement
        for _ in range(plan.steps):
            for key, step in runs.items():
                result["times"][key].append(timed(step))
            lasts += sleeps(plan.unit)
    return result


def sleeps(unit: float, count: int = 10) -> list[float]:
    """How long `count` sleeps last that begin together on all ranks."""
    dist.barrier()
    found = []
    for _ in range(count):
        start = time.perf_counter()
        time.sleep(unit)
        found.append(time.perf_counter() - start)
    return found


def no_pipeline(plan: Plan, trios: list[Trio]) -> None:
    """F, I and W of every micro-batch, one after the other, in this process; leaves how long each of them took."""
    weight = torch.ones(1, requires_grad=True)
    waiting: list[Callable[[], None]] = []
    for _ in range(plan.micro_batches):
        start = time.perf_counter()
        loss = Sleep.apply(torch.zeros(SHAPE, requires_grad=True), weight, plan.unit, waiting.append).mean()
        forward = time.perf_counter()
        loss.backward()
        inputs = time.perf_counter()
        waiting.pop()()
        trios.append((forward - start, inputs - forward, time.perf_counter() - inputs))


def timed(step: Callable[[], object]) -> Timed:
    dist.barrier()
    start = time.perf_counter()
    step()
    return start, time.perf_counter()


def our_step(schedule: Schedule, rank: int, links: Links, plan: Plan, delay: float) -> Callable[[], object]:
    queue = WeightGradQueue()
    last = schedule.num_stages - 1
    stages = {s: EmulatedStage(plan.unit, queue, s == 0, s == last) for s in schedule.stages_of(rank)}
    transport = DelayedLink(links, delay) if delay else None
    runtime = Runtime(stages, schedule, rank, links, queue, timeout=TIMEOUT, transport=transport)
    return partial(runtime.step, [torch.zeros(SHAPE) for _ in range(plan.micro_batches)])


def bare_step(schedule: Schedule, rank: int, links: Links, plan: Plan) -> Callable[[], object]:
    """A rank's row with nothing around it: sleeps, and messages handed to gloo by the thread that sleeps."""
    messages = plan_messages(schedule, rank)
    order = [  # a pair runs its backward first, as ours does
        (action, messages.incoming.get(action), messages.outgoing.get(action), messages.posts.get(step, ()) * first)
        for step in schedule.steps[rank]
        for action, first in zip(reversed(parts(step)), (1, 0), strict=False)
    ]
    group, tags = next(iter(links.groups.values())), links.tags
    payload = torch.zeros(SHAPE)

    def run() -> None:
        receives, sends = {}, []
        for action, incoming, outgoing, posts in order:
            for m in posts:
                tag = tags.of(m.micro_batch, m.stage, m.cargo)
                receives[m] = group.recv([torch.empty(SHAPE)], m.source, tag)
            if incoming is not None:
                receives.pop(incoming).wait()
            work(plan.unit)
            if outgoing is not None:
                tag = tags.of(outgoing.micro_batch, outgoing.stage, outgoing.cargo)
                sends.append(group.send([payload], outgoing.destination, tag))
            if action.kind is Kind.B:
                work(plan.unit)
        for send in sends:
            send.wait()

    return run


def pytorch_step(name: str, rank: int, world: int, plan: Plan) -> tuple[Callable[[], object], str]:
    """A step of PyTorch's schedule on the same stages, and its order of actions as CSV."""
    last = 2 * world - 1 if name != "one_f_one_b" else world - 1
    numbers = [rank] if name == "one_f_one_b" else [rank, last - rank]
    modules = [EmulatedModule(plan.unit) for _ in numbers]
    device = torch.device("cpu")
    stages = [PipelineStage(m, s, last + 1, device, dw_builder=m.take) for m, s in zip(modules, numbers, strict=True)]
    single = name == "one_f_one_b"
    schedule = PYTORCH[name](stages[0] if single else stages, plan.micro_batches, loss_fn=lambda out, _: out.mean())
    x = torch.zeros(plan.micro_batches * SHAPE[0], *SHAPE[1:])
    args = (x,) if 0 in numbers else ()
    kwargs: dict[str, Any] = {"target": x, "losses": []} if last in numbers else {}
    order = ""
    if not single:
        rows = schedule.pipeline_order
        order = "\n".join(",".join("" if a is None else str(a) for a in rows[r]) for r in range(world))
    return partial(schedule.step, *args, **kwargs), order


def evaluate(world: int, plan: Plan) -> list[Row]:
    """Run all of it on `world` ranks, print what was measured, return the rows to publish."""
    results = run_ranks(world, measure, plan, timeout=900)
    rows = []
    for name in plan.schedules:
        sleeping, controls = without_pipeline(results, name, plan)
        times = f"lasts {1e3 * sleeping.lasts:.3f} ms and costs {1e3 * sleeping.cost:.3f}"
        print(f"{name}, {world} ranks: a sleep of {1e3 * plan.unit:g} ms {times}")
        rows += controls
        schedule = make_schedule(name, world, plan.micro_batches)
        rows += compare(f"{name}, {world} ranks", whole(results, ("ours", name)), sleeping, schedule)
        bare = statistics.median(whole(results, ("bare", name)))
        rows.append(Row(rows[-1].case, "s/step", rows[-1].ours, "bare loop", bare))
        if name in PYTORCH:
            order = results[0]["orders"][name]
            theirs = read_csv(order) if order else schedule
            case = f"PyTorch's {PYTORCH[name].__name__}, {world} ranks"
            rows += compare(case, whole(results, ("pytorch", name)), sleeping, theirs, leaves=(False,))
        if plan.delay:
            late = f"{name}, {world} ranks, messages {1e3 * plan.delay:g} ms late"
            rows += compare(late, whole(results, ("delayed", name)), sleeping, schedule, latency=plan.delay)
    return rows


def without_pipeline(results: Sequence[dict[str, Any]], name: str, plan: Plan) -> tuple[Sleeping, list[Row]]:
    """What sleeps cost while this schedule was measured, and the rows about it."""
    alone, warm = (seconds(results, (who, name)) for who in ("alone", "warm"))
    lasts, trios = ([found for r in results for found in r[what][name]] for what in ("sleeps", "trios"))
    count = 3 * plan.micro_batches
    sleeping = Sleeping.of(lasts, alone, warm, trios, count)
    case = f"no pipeline, {len(results)} processes, beside {name}"
    return sleeping, [
        Row(case, "s/step", alone, "as long as sleeps last", count * sleeping.lasts),
        Row(f"{case}, without sleeps", "s/step", warm, "with sleeps", alone),
    ]


def compare(
    case: str,
    spans: Sequence[float],
    sleeping: Sleeping,
    schedule: Schedule,
    latency: float = 0.0,
    leaves: Sequence[bool] = (False, True),
) -> list[Row]:
    """The median step beside the schedule's makespan; `leaves`: do results leave early in it? once for each answer."""
    median = statistics.median(spans)
    rows = [
        Row(case, "s/step", median, peer + ", early" * early, theory)
        for early in leaves
        for peer, theory in sleeping.makespans(schedule, latency, early).items()
    ]
    print(f"  {case:44} {' '.join(f'{s / rows[1].theirs:.3f}' for s in sorted(spans))}")
    return rows


def whole(results: Sequence[dict[str, Any]], run: tuple[str, str]) -> list[float]:
    """How long each step of a run took, from the first rank's start to the last one's end."""
    columns = [r["times"][run] for r in results]
    return [max(end for _, end in step) - min(start for start, _ in step) for step in zip(*columns, strict=True)]


def seconds(results: Sequence[dict[str, Any]], run: tuple[str, str]) -> float:
    """The median over steps and ranks of how long a rank took for this run, of those that took part."""
    steps = [end - start for r in results for start, end in r["times"][run]]
    return statistics.median(s for s in steps if s > 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    parser.add_argument("--micro-batches", type=int, default=20)
    parser.add_argument("--unit", type=float, default=0.010, help="seconds of F, of I and of W")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--delay", type=float, default=0.002, help="seconds; 0 leaves the second table out")
    options = parser.parse_args()
    plan = Plan(tuple(options.schedules), options.micro_batches, options.unit, options.steps, options.delay)
    rows = [row for world in options.ranks for row in evaluate(world, plan)]
    publish("schedule_runtime", rows)


if __name__ == "__main__":
    main()
