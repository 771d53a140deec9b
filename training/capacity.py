"""Does a rank's part of the model fit into its memory? Asked before anything is allocated, by counting.

The stages are built on torch's meta device, where a tensor has a shape and no data; what each parameter then costs is
the formula of `parallel/memory.py`. Activations come on top, so what fits here may still be too large; what does not
fit here never fits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import psutil
import torch

from dualpipe.schedule import Schedule
from dualpipe.wgrad import WeightGradQueue
from model.precisions import make_precision
from model.stage import ModelStage
from parallel.build import BuildOptions, build_stages
from parallel.grads import mirrors
from parallel.memory import predict
from parallel.mesh import Layout, Mesh
from training.config import Config
from training.plan import stage_sizes

LARGEST = 2**31  # of any size in the configuration: torch counts elements in 64 bits, and sizes are multiplied


def check_sizes(config: Config) -> None:
    """Raise ValueError for a size that no machine could hold and that torch may not even be able to write down."""
    for group in ("model", "data"):
        for name, value in vars(getattr(config, group)).items():
            if isinstance(value, int) and value > LARGEST:
                raise ValueError(f"{group}.{name}={value} must be at most {LARGEST}")


def build_on_meta(config: Config, layout: Layout, schedule: Schedule, rank: int) -> dict[int, ModelStage]:
    """A rank's stages with shapes only. Raises ValueError if a tensor has more elements than can be counted."""
    precision, dtype = make_precision(config.precision, here=False)
    options = BuildOptions(param_dtype=dtype, device="meta", layers_per_stage=stage_sizes(config, schedule))
    mesh = Mesh(layout, rank, None, None, None, None, None)
    try:
        return build_stages(config.model, schedule, mesh, precision, options, WeightGradQueue())
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"the sizes of model.* make a tensor that torch cannot describe: {error}") from error


def bytes_per_rank(config: Config, layout: Layout, schedule: Schedule, rank: int) -> int:
    """Weights, gradients and moments of a rank."""
    stages = build_on_meta(config, layout, schedule, rank)
    pps = next(len(pps) for pps in mirrors(schedule) if layout.pp_of(rank) in pps)
    moment = 2 if config.optim.moments == "bf16" else 4
    dense, routed = pps * layout.dp, pps * layout.dp // layout.ep
    return predict(stages.values(), dense, routed, config.optim.zero, moment).total


def check_capacity(config: Config, layout: Layout, schedule: Schedule, device: torch.device) -> None:
    """Raise ValueError if this machine cannot hold what its ranks need."""
    first = int(os.environ.get("RANK", 0)) - int(os.environ.get("LOCAL_RANK", 0))
    local = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if device.type == "cuda":
        _refuse_more_than(torch.cuda.mem_get_info(device)[1], config, layout, schedule, [first])
    else:
        _refuse_more_than(psutil.virtual_memory().total, config, layout, schedule, local)


def _refuse_more_than(available: int, config: Config, layout: Layout, schedule: Schedule, ranks: Iterable[int]) -> None:
    by_place: dict[tuple[int, int], int] = {}  # ranks at the same PP and EP place need the same
    needed = 0
    for rank in ranks:
        place = (layout.pp_of(rank), layout.ep_of(rank))
        if place not in by_place:
            by_place[place] = bytes_per_rank(config, layout, schedule, rank)
        needed += by_place[place]
    if needed > available:
        raise ValueError(
            f"weights, gradients and moments need {needed / 2**30:.1f} GiB, and there are {available / 2**30:.1f} GiB; "
            f"choose a smaller model, or spread it over more ranks (parallel.pp, parallel.ep, optim.zero=1)"
        )
