"""What would a configuration need? Everything is built as each PP rank would build it, and nothing is allocated.

    python train.py dry_run=true launch.processes=2048 model=deepseek_v3_671b parallel.pp=16 parallel.ep=64 …

One process takes the place of each PP rank in turn: it joins a world of any size through torch's fake process groups,
whose operations do nothing, makes the mesh, the stages on the meta device, the pipeline and the gradient buckets, and
runs one micro-batch through every kind of stage (`parallel/rehearsal.py`). Memory, operations and bytes on the links
are read off that; the bubble is the simulator's, with a stage's operations as its costs. `training/forecast.py` says
it in words.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dualpipe.costs import Costs
from dualpipe.schedule import Schedule
from dualpipe.simulator import simulate
from dualpipe.timeline import Timeline
from dualpipe.wgrad import WeightGradQueue
from model.batch import MicroBatch
from model.layer import Layer
from model.precision import Precision
from model.precisions import make_precision
from model.stage import ModelStage
from parallel.buckets import GradBucket, make_buckets
from parallel.build import BuildOptions, build_pipeline, build_stages
from parallel.grads import embedding_holders, mirrors
from parallel.memory import Memory, predict
from parallel.mesh import Layout, Mesh
from parallel.rehearsal import PaperDispatcher, Rehearsal, peak_bytes, rehearse
from parallel.traffic import Nodes, Spread, Tokens, Traffic, expert_bytes, gradient_bytes, pipeline_bytes, spread_of
from training.config import Config
from training.plan import stage_sizes
from training.validate import nodes_of, ranks_per_node, validate

MOST_TOKENS = 2**18  # of a micro-batch; beyond, even going through its shapes takes minutes


@dataclass(frozen=True)
class RankPlan:
    """What each rank at one place of the pipeline holds, keeps and sends per step; sizes in bytes."""

    pp: int
    stages: tuple[int, ...]
    layers: int
    parameters: int
    memory: Memory
    activations: int
    traffic: Traffic

    @property
    def total(self) -> int:
        return self.memory.total + self.activations


@dataclass(frozen=True)
class Plan:
    """By stage: rehearsals, and numbers of (dense, MoE) layers. `timeline` is of one step, in operations."""

    config: Config
    layout: Layout
    schedule: Schedule
    nodes: Nodes
    ranks: tuple[RankPlan, ...]
    rehearsals: dict[int, Rehearsal]
    layers: dict[int, tuple[int, int]]
    timeline: Timeline

    @property
    def tokens_per_step(self) -> int:
        data = self.config.data
        return self.schedule.num_micro_batches * self.layout.dp * data.micro_batch_size * data.seq_len


def make_plan(config: Config, world: int) -> Plan:
    """Build everything that `world` processes would. Raises ValueError for a configuration that cannot work."""
    layout, schedule = validate(config, world, here=False)
    tokens = config.data.micro_batch_size * config.data.seq_len
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"a micro-batch of data.micro_batch_size={config.data.micro_batch_size} × data.seq_len="
            f"{config.data.seq_len} tokens is more than any device takes; lower one of them"
        )
    nodes = Nodes(layout, ranks_per_node(config, layout, here=False))
    local = max(1, min(layout.ep, layout.dp_per_node(nodes.ranks_per_node)))
    spread = spread_of(config.model, layout.ep, local)
    known: dict[tuple[int, int, bool, bool], Rehearsal] = {}  # stages of the same parts do the same
    rehearsals: dict[int, Rehearsal] = {}
    layers: dict[int, tuple[int, int]] = {}
    built: list[tuple[int, Memory, Traffic]] = []
    for pp in range(layout.pp):
        with _rank(config, layout, schedule, pp, spread) as rank:
            for number, stage in rank.stages.items():
                layers[number] = _layers(stage)
                kind = (*layers[number], stage.shape.is_first, stage.shape.is_last)
                if kind not in known:
                    known[kind] = rehearse(stage, _micro_batch(config), rank.queue)
                rehearsals[number] = known[kind]
            built.append(_measure(config, rank, schedule, nodes, spread))
    ranks = []
    for pp, (parameters, memory, traffic) in enumerate(built):
        stages, peak = schedule.stages_of(pp), peak_bytes(schedule.steps[pp], rehearsals)
        ranks.append(RankPlan(pp, stages, sum(sum(layers[s]) for s in stages), parameters, memory, peak, traffic))
    timeline = simulate(schedule, costs_of(rehearsals))
    return Plan(config, layout, schedule, nodes, tuple(ranks), rehearsals, layers, timeline)


@dataclass(frozen=True)
class _Rank:
    pp: int
    stages: dict[int, ModelStage]
    buckets: list[GradBucket]
    queue: WeightGradQueue
    precision: Precision


@contextmanager
def _rank(config: Config, layout: Layout, schedule: Schedule, pp: int, spread: Spread) -> Iterator[_Rank]:
    """This process as one rank of the world, with everything that the rank would make before it trains."""
    timeout = timedelta(seconds=config.launch.timeout_seconds)
    precision, dtype = make_precision(config.precision, here=False)
    options = BuildOptions(
        param_dtype=dtype,
        device="meta",
        layers_per_stage=stage_sizes(config, schedule),
        overlap=config.parallel.overlap != "off",
        timeout=timeout,
    )
    dist.init_process_group("fake", rank=layout.rank(pp, 0), world_size=layout.world, store=FakeStore())
    try:
        holders = embedding_holders(schedule, config.model)
        per_node = nodes_of(config, layout, here=False)
        mesh = Mesh.create(layout, mirrors(schedule), timeout, holders, per_node, host_backend="fake")
        dispatcher, queue = PaperDispatcher(config.model.num_experts // layout.ep, spread.ranks), WeightGradQueue()
        stages = build_stages(config.model, schedule, mesh, precision, options, queue, dispatcher)
        if pp == 0:  # it goes through the whole schedule, and once is enough
            build_pipeline(stages, schedule, mesh, queue, options)
        yield _Rank(pp, stages, make_buckets(stages, mesh), queue, precision)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(
            f"the sizes of model.* and data.* make a tensor that torch cannot describe: {error}"
        ) from error
    finally:
        dist.destroy_process_group()


def _measure(
    config: Config, rank: _Rank, schedule: Schedule, nodes: Nodes, spread: Spread
) -> tuple[int, Memory, Traffic]:
    """Parameters, memory and traffic of a rank."""
    layout, model, data, pp = nodes.layout, config.model, config.data, rank.pp
    copies = next(len(pps) for pps in mirrors(schedule) if pp in pps) * layout.dp
    moment = 2 if config.optim.moments == "bf16" else 4
    memory = predict(rank.stages.values(), copies, copies // layout.ep, config.optim.zero, moment)
    number, dtype = data.micro_batch_size * data.seq_len, rank.precision.dtype
    hierarchical = nodes_of(config, layout, here=False) is not None
    fp8 = rank.precision.wire is not None
    tokens = Tokens(number, model.hidden_size, dtype, model.experts_per_token, hierarchical, fp8=fp8)
    moe_layers = {stage: _layers(module)[1] for stage, module in rank.stages.items()}
    traffic = Traffic(
        pipeline_bytes(schedule, pp, number * model.hidden_size * dtype.itemsize, nodes),
        expert_bytes(schedule, pp, moe_layers, tokens, nodes, spread),
        gradient_bytes(rank.buckets, config.optim.zero, nodes),
    )
    return sum(bucket.numel for bucket in rank.buckets), memory, traffic


def _layers(stage: ModelStage) -> tuple[int, int]:
    """How many dense and MoE layers a stage has, those of MTP among them."""
    kinds = [module.is_moe for module in stage.modules() if isinstance(module, Layer)]
    return kinds.count(False), kinds.count(True)


def _micro_batch(config: Config) -> MicroBatch:
    shape = (config.data.micro_batch_size, config.data.seq_len)
    tokens = torch.empty(shape, dtype=torch.int64, device="meta")
    depth = config.model.mtp_depth if config.loss.mtp_weight else 0
    weights = config.balance.sequence_loss or config.balance.aux_loss
    scales = (1.0, (1.0,) * depth, config.loss.z_weight, 1.0 if weights else 0.0)
    return MicroBatch(tokens, tokens, tokens, tokens, *scales)


def costs_of(rehearsals: dict[int, Rehearsal]) -> Costs:
    """Operations as costs; communication and what does not multiply matrices are left out."""
    stages = [rehearsals[number] for number in sorted(rehearsals)]
    return Costs(
        forward=tuple(r.forward.flops for r in stages),
        inputs=tuple(r.inputs.flops for r in stages),
        weights=tuple(r.weights.flops for r in stages),
    )
