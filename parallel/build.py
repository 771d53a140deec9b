"""Puts one rank together: its stages, its pipeline, its gradient buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch

import dualpipe.stage as stage_types
from dualpipe.runtime import Runtime
from dualpipe.schedule import Schedule
from dualpipe.wgrad import WeightGradQueue
from model.balance import NO_BALANCE, Balance
from model.config import ModelConfig, split_layers
from model.init import initialise
from model.layers import Toolbox
from model.precision import Precision
from model.protocols import Dispatcher
from model.stage import ModelStage, StageShape
from parallel.buckets import GradBucket, make_buckets
from parallel.dispatchers import DISPATCHERS
from parallel.mesh import Mesh


@dataclass(frozen=True)
class Replica:
    """What one rank trains: stages by number, the pipeline that runs them, their gradients, the precision."""

    stages: dict[int, ModelStage]
    pipeline: Runtime
    buckets: list[GradBucket]
    precision: Precision
    mesh: Mesh
    schedule: Schedule
    config: ModelConfig
    queue: WeightGradQueue
    options: BuildOptions


@dataclass(frozen=True)
class BuildOptions:
    """How to build: dtype of the parameters, device, layers per stage (None: equal), overlap, timeout of messages.

    dispatch  the backend that carries tokens to their experts (`dispatchers.py`)
    balance   the routers' losses, and forced routing for benchmarks
    placement   the order of the experts over the EP ranks, by layer (see Toolbox)
    """

    seed: int = 0
    param_dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    layers_per_stage: tuple[int, ...] | None = None
    overlap: bool = True
    compile: bool = False
    dispatch: str = "all_to_all"
    balance: Balance = NO_BALANCE
    placement: Mapping[int, Sequence[int]] = field(default_factory=dict)
    timeout: timedelta = timedelta(minutes=5)


def build_replica(
    config: ModelConfig, schedule: Schedule, mesh: Mesh, precision: Precision, options: BuildOptions
) -> Replica:
    """Build this rank's part of the model with its initial weights. Raises ValueError if the sizes do not fit."""
    queue = WeightGradQueue()
    stages = build_stages(config, schedule, mesh, precision, options, queue)
    pipeline = build_pipeline(stages, schedule, mesh, queue, options)
    buckets = make_buckets(stages, mesh)
    return Replica(stages, pipeline, buckets, precision, mesh, schedule, config, queue, options)


def with_schedule(replica: Replica, schedule: Schedule) -> Replica:
    """The same stages and weights in a pipeline of another schedule, whose placement must be the same."""
    pipeline = build_pipeline(replica.stages, schedule, replica.mesh, replica.queue, replica.options)
    return replace(replica, pipeline=pipeline, schedule=schedule)


def build_pipeline(
    stages: Mapping[int, ModelStage], schedule: Schedule, mesh: Mesh, queue: WeightGradQueue, options: BuildOptions
) -> Runtime:
    return Runtime(
        stages,
        schedule,
        mesh.pp,
        mesh.links,
        queue,
        overlap=options.overlap,
        device=torch.device(options.device),
        timeout=options.timeout,
    )


def build_stages(
    config: ModelConfig,
    schedule: Schedule,
    mesh: Mesh,
    precision: Precision,
    options: BuildOptions,
    queue: WeightGradQueue,
    dispatcher: Dispatcher | None = None,
) -> dict[int, ModelStage]:
    """The stages of a rank by number. `dispatcher` takes the place of the one that `options.dispatch` names."""
    config.check()
    if config.num_experts % mesh.layout.ep:
        raise ValueError(
            f"model.num_experts={config.num_experts} is not divisible by parallel.ep={mesh.layout.ep}; change one"
        )
    share = config.num_experts // mesh.layout.ep
    experts = range(mesh.ep * share, (mesh.ep + 1) * share)
    dispatcher = dispatcher or DISPATCHERS[options.dispatch].make(mesh.expert, share, config, precision)
    device, balance = options.device, options.balance
    tools = Toolbox(
        precision, queue, dispatcher, options.param_dtype, device, balance, options.placement, options.compile
    )
    layers = split_layers(config, schedule.num_stages, options.layers_per_stage)
    last = schedule.num_stages - 1
    stages: dict[int, ModelStage] = {}
    for number in schedule.stages_of(mesh.pp):
        shape = StageShape(layers[number], experts, number == 0, number == last)
        embedding = stages[0].embedding if 0 in stages else None
        stages[number] = ModelStage(config, shape, tools, stage_types, embedding)
        if torch.device(options.device).type != "meta":  # without memory there is nothing to fill
            initialise(stages[number], options.seed, config.init_std)
    return stages
