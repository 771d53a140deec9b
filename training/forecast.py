"""A dry run in words: the layout, memory, bubble and traffic of a `Plan`, and what is wrong with it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean as mean

from dualpipe.simulator import simulate
from dualpipe.split import ModelWork, Work
from dualpipe.table import format_table
from model.describe import count_parameters, training_flops
from parallel.rank_table import crossing, numbers, rank_table
from parallel.rehearsal import Rehearsal
from training.config import Config
from training.dry_run import Plan, RankPlan, costs_of, make_plan
from training.outcome import BAD_CONFIG, DONE
from training.plan import schedule_for

MOST_ROWS = 32
LONG_BUBBLE = 0.1  # of all ranks' time
UNEVEN = 1.15  # a stage's operations over the mean
NOT_COUNTED = "Not counted: what CUDA, NCCL and the allocator take (allow several GiB), receive buffers, the corpus."


def dry_run(config: Config, world: int) -> int:
    """Print what `world` processes would need; returns the exit code, which is not 0 if they cannot train."""
    began = time.perf_counter()
    try:
        plan = make_plan(config, world)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_CONFIG
    print(describe(plan))
    wrong, doubtful = errors(plan), warnings(plan)
    for kind, lines in (("error", wrong), ("warning", doubtful)):
        for line in lines:
            print(f"{kind}: {line}")
    verdict = "It cannot train like this" if wrong else "It can train like this"
    print(f"{verdict}. Nothing was allocated or started; this took {time.perf_counter() - began:.1f} s.", flush=True)
    return BAD_CONFIG if wrong else DONE


def describe(plan: Plan) -> str:
    """The whole forecast without its faults."""
    return "\n\n".join((_what(plan), _where(plan), _memory(plan), _bubble(plan), _traffic(plan)))


def _what(plan: Plan) -> str:
    config, layout, data = plan.config, plan.layout, plan.config.data
    parameters = count_parameters(config.model)
    sequences = plan.tokens_per_step // data.seq_len
    rows = [
        ("model", f"{_short(parameters.main)} parameters, {_short(parameters.active)} of them active per token"),
        (
            "layout",
            f"{layout.world} ranks = PP {layout.pp} × DP {layout.dp}, EP {layout.ep}, "
            f"{-(-layout.world // plan.nodes.ranks_per_node)} nodes of {plan.nodes.ranks_per_node}",
        ),
        (
            "schedule",
            f"{plan.schedule.name}, {plan.schedule.num_stages} stages, {plan.schedule.num_micro_batches} micro-batches "
            f"of {data.micro_batch_size} × {data.seq_len} tokens",
        ),
        ("one step", f"{sequences:,} sequences, {_short(plan.tokens_per_step)} tokens"),
        ("operations", f"{_short(training_flops(config.model, data.seq_len))} per trained token, recomputation apart"),
        ("precision", f"{config.precision.name}, optimizer state ZeRO {config.optim.zero}, {config.optim.moments}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _where(plan: Plan) -> str:
    return rank_table(plan.layout, plan.schedule, plan.nodes.ranks_per_node)


def _memory(plan: Plan) -> str:
    unit = _unit(max(rank.total for rank in plan.ranks))
    head = ("pp", "stages", "layers", "params", "weights", "gradients", "optimizer", "activations", "in all")

    def cells(rank: RankPlan) -> tuple[str, ...]:
        m = rank.memory
        sizes = (m.weights + m.cached, m.gradients, m.masters + m.moments, rank.activations, rank.total)
        return (
            str(rank.pp), numbers(rank.stages), str(rank.layers), _short(rank.parameters), *map(unit.number, sizes)
        )  # fmt: skip

    return f"Memory of each rank, {unit.name}\n{_table(head, plan, cells)}\n{NOT_COUNTED}"


def _bubble(plan: Plan) -> str:
    timeline, flops = plan.timeline, stage_flops(plan)
    idle = [time / timeline.makespan for time in timeline.idle]
    live = max(timeline.peak_activations)
    return "\n".join(
        (
            f"Bubble {timeline.bubble:.1%} of all ranks' time (by rank {min(idle):.1%} to {max(idle):.1%}), with the "
            f"operations of matrix products as costs",
            f"Heaviest stage {flops.index(max(flops))}, {max(flops) / mean(flops):.2f} times the mean",
            f"At most {live} stages' activations live on a rank",
        )
    )


def _traffic(plan: Plan) -> str:
    sums = [rank.traffic.total for rank in plan.ranks]
    unit = _unit(max(total.inside + total.across for total in sums))
    head = ("pp", "pipeline", "experts", "gradients", "in all")

    def cells(rank: RankPlan) -> tuple[str, ...]:
        t = rank.traffic
        kinds = (t.pipeline, t.experts, t.gradients, t.total)
        return (str(rank.pp), *(f"{unit.number(b.inside)} / {unit.number(b.across)}" for b in kinds))

    nodes = -(-plan.layout.world // plan.nodes.ranks_per_node)
    leaving = sum(total.across for total in sums) * plan.layout.dp / nodes
    return (
        f"Sent by each rank per step, {unit.name}: inside its node / between nodes\n{_table(head, plan, cells)}\n"
        f"A node sends {unit.number(leaving)} {unit.name} to other nodes in a step."
    )


def _table(head: Sequence[str], plan: Plan, cells: Callable[[RankPlan], tuple[str, ...]]) -> str:
    """One row for each place of the pipeline; of a long pipeline the first ones."""
    table = format_table(head, [cells(rank) for rank in plan.ranks[:MOST_ROWS]])
    return table if len(plan.ranks) <= MOST_ROWS else f"{table}\n… and {len(plan.ranks) - MOST_ROWS} more"


def errors(plan: Plan) -> list[str]:
    """What keeps it from training."""
    fullest = max(plan.ranks, key=lambda rank: rank.total)
    have = plan.config.launch.device_gib
    if fullest.total <= have * 2**30:
        return []
    parts = {
        "activations": fullest.activations,
        "weights": fullest.memory.weights + fullest.memory.cached,
        "gradients": fullest.memory.gradients,
        "the optimizer": fullest.memory.masters + fullest.memory.moments,
    }
    largest = max(parts, key=lambda name: parts[name])
    return [
        f"PP rank {fullest.pp} needs {GIB.number(fullest.total)} GiB and has launch.device_gib={have:g}; most of it "
        f"are {largest} ({GIB.number(parts[largest])} GiB). {_remedy(plan, largest)}"
    ]


def _remedy(plan: Plan, largest: str) -> str:
    config, found = plan.config, []
    if largest == "activations":
        if config.data.micro_batch_size > 1:
            found.append(f"data.micro_batch_size={config.data.micro_batch_size // 2}")
        if not config.model.recompute:
            found.append("model.recompute=true")
        if config.precision.name in ("fp32", "fp64"):
            found.append("precision=bf16")
        found.append(f"shorter sequences than data.seq_len={config.data.seq_len}")
    else:
        if not config.optim.zero:
            found.append("optim.zero=1")
        if config.optim.moments == "fp32":
            found.append("optim.moments=bf16")
        found.append(f"a larger parallel.ep than {plan.layout.ep} or parallel.pp than {plan.layout.pp}")
    return f"What helps: {', '.join(found)}"


def warnings(plan: Plan) -> list[str]:
    """What works and probably is not meant."""
    found = []
    layout, per_node = plan.layout, plan.nodes.ranks_per_node
    if layout.world % per_node:
        found.append(f"{layout.world} ranks do not fill nodes of {per_node}; parallel.ranks_per_node says how many")
    if (slow := crossing(layout, per_node).warning) is not None:
        found.append(slow)
    bubble, more = plan.timeline.bubble, 2 * plan.schedule.num_micro_batches
    if bubble > LONG_BUBBLE:
        found.append(
            f"the bubble is {bubble:.0%}; schedule.micro_batches={more} would make it {_bubble_at(plan, more):.0%}"
        )
    flops = stage_flops(plan)
    if max(flops) > UNEVEN * mean(flops):
        heaviest = (
            f"stage {flops.index(max(flops))} computes {max(flops) / mean(flops):.2f} times the mean, and all wait"
        )
        better = balanced(plan)
        found.append(f"{heaviest} for it" if better is None else f"{heaviest}; {better}")
    return found


def balanced(plan: Plan) -> str | None:
    """A more even split of the layers, with its bubble; None if there is none or its work cannot be told apart."""
    work = _model_work(plan)
    if work is None:
        return None
    sizes = work.balanced(plan.schedule.num_stages, len(plan.schedule.stages_of(0)) > 1)
    bubble = simulate(plan.schedule, work.stages(sizes)).bubble
    if bubble > 0.9 * plan.timeline.bubble:
        return None
    return f"parallel.layers_per_stage={str(list(sizes)).replace(' ', '')} would make the bubble {bubble:.0%}"


def _model_work(plan: Plan) -> ModelWork | None:
    """What a dense and a MoE layer compute, and the last stage besides, from stages with different numbers of them."""
    model = plan.config.model
    stages = [(_work_of(plan.rehearsals[n]), *plan.layers[n]) for n in sorted(plan.layers)]
    moe = next((_scaled(work, 1 / count) for work, none, count in stages[1:-1] if not none and count), None)
    if moe is None:
        return None
    work, number, others = stages[0]
    dense = _scaled(work + _scaled(moe, -others), 1 / number) if number else moe
    work, number, others = stages[-1]
    last = work + _scaled(dense, -number) + _scaled(moe, -(others - model.mtp_depth))
    layers = (dense,) * model.num_dense_layers + (moe,) * model.num_moe_layers
    return ModelWork(layers, last=last)


def _work_of(rehearsal: Rehearsal) -> Work:
    return Work(rehearsal.forward.flops, rehearsal.inputs.flops, rehearsal.weights.flops)


def _scaled(work: Work, factor: float) -> Work:
    return Work(work.forward * factor, work.inputs * factor, work.weights * factor)


def stage_flops(plan: Plan) -> Sequence[float]:
    """Of one micro-batch, forward and backward, by stage."""
    costs = costs_of(plan.rehearsals)
    return [f + b for f, b in zip(costs.forward, costs.backward, strict=True)]


def _bubble_at(plan: Plan, micro_batches: int) -> float:
    """The bubble with another number of micro-batches."""
    schedule = schedule_for(plan.config, micro_batches, plan.schedule)
    return simulate(schedule, costs_of(plan.rehearsals)).bubble


def _short(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"


@dataclass(frozen=True)
class _Unit:
    name: str
    size: int

    def number(self, size: float) -> str:
        value = size / self.size
        return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _unit(largest: float) -> _Unit:
    return GIB if largest >= 2**30 else _Unit("MiB", 2**20)


GIB = _Unit("GiB", 2**30)
