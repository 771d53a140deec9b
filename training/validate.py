"""Does a configuration hold together? Checked before any process group, file or folder is made.

Every message names the override that mends it.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re

import torch

from dualpipe.schedule import Pair, Schedule
from model.balance import FORCES
from model.config import split_layers
from model.precisions import make_precision
from parallel.dispatchers import check_dispatch
from parallel.grads import mirrors
from parallel.mesh import Layout
from parallel.zero import check_deepspeed
from training.capacity import check_sizes
from training.config import Config
from training.plan import choose_schedule, schedule_for, stage_sizes
from training.recipe import check_pieces, check_ramp
from training.tensorboard import check_tensorboard

MAX_MICRO_BATCHES = 16_384  # what the tags of messages can number (dualpipe/p2p.py)


def validate(config: Config, world: int, here: bool = True) -> tuple[Layout, Schedule]:
    """Check the whole configuration for `world` processes; returns the layout and the schedule that it asks for.

    here   it is to run on this machine, whose devices and packages matter then

    Raises ValueError with one message for the first thing that is wrong.
    """
    check_sizes(config)
    config.model.check()
    config.optim.check()
    config.loss.check()
    config.guard.check()
    config.profile.check(world)
    _check_numbers(config)
    _check_choices(config)
    if here:
        _check_machine(config)
    check_pieces("balance.bias_rate_schedule", config.balance.bias_rate_schedule)
    make_precision(config.precision, here)
    parallel = config.parallel
    config.recipe.check()
    if config.eval.ema and not config.optim.ema:
        raise ValueError("eval.ema=true needs an average: set optim.ema, e.g. optim.ema=0.999")
    if config.optim.zero and config.precision.name == "fp64":
        raise ValueError("optim.zero=1 keeps FP32 masters; precision=fp64 needs optim.zero=0")
    if config.optim.moments == "bf16" and config.precision.name == "fp64":
        raise ValueError("optim.moments=bf16 are rounded from FP32; precision=fp64 needs optim.moments=fp32")
    layout = Layout(world, parallel.pp, parallel.ep, parallel.order)  # before the schedule: a huge PP ends here
    schedule = choose_schedule(config)
    if config.model.num_experts % config.parallel.ep:
        raise ValueError(
            f"model.num_experts={config.model.num_experts} is not divisible by parallel.ep={config.parallel.ep}; "
            f"change one of them"
        )
    split_layers(config.model, schedule.num_stages, stage_sizes(config, schedule))
    mirrors(schedule)
    has_pairs = any(isinstance(step, Pair) for row in schedule.steps for step in row)
    if parallel.overlap == "on" and not has_pairs:
        raise ValueError(
            f"parallel.overlap=on, but schedule={config.schedule.name} has no pairs to overlap; use "
            f"parallel.overlap=auto, or schedule=dualpipe"
        )
    nodes_of(config, layout, here)
    _check_ramp(config, layout, schedule)
    if config.data.path is not None and not os.path.exists(config.data.path):
        raise ValueError(f"data.path={config.data.path} does not exist; give a folder or a file of text")
    return layout, schedule


def nodes_of(config: Config, layout: Layout, here: bool = True) -> int | None:
    """Ranks per node, if the dispatch backend wants groups by node. Raises ValueError if it cannot work."""
    parallel = config.parallel
    device = resolve_device(config.launch.device).type if here else "cpu" if config.launch.device == "cpu" else "cuda"
    return check_dispatch(
        parallel.dispatch, layout, ranks_per_node(config, layout, here), config.precision.name, device
    )


def ranks_per_node(config: Config, layout: Layout, here: bool = True) -> int:
    """As configured, or as torchrun says; elsewhere 8."""
    usual = layout.world if here else min(8, layout.world)
    return config.parallel.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", usual))


def resolve_device(name: str) -> torch.device:
    """The device of this process for launch.device. Raises ValueError if there is none of that kind."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("launch.device=cuda, but torch sees no GPU here; use launch.device=cpu")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def _check_ramp(config: Config, layout: Layout, schedule: Schedule) -> None:
    """Every size of a growing batch must suit the schedule."""
    unit = config.data.micro_batch_size * layout.dp
    for micro_batches in check_ramp(config.recipe, config.schedule.micro_batches * unit, unit):
        try:
            schedule_for(config, micro_batches, schedule)
        except ValueError as error:
            raise ValueError(
                f"{error}: recipe.batch_start and recipe.batch_increment lead to {micro_batches} micro-batches of "
                f"{unit} sequences"
            ) from error


def _check_numbers(config: Config) -> None:
    at_least_one = ("steps", "eval_every", "save_every", "keep_last", "log_every", "trace_every")
    limits = [(name, getattr(config, name), 1, math.inf) for name in at_least_one] + [
        ("sample_tokens", config.sample_tokens, 0, math.inf),
        ("eval.sample_tokens", config.eval.sample_tokens, 0, math.inf),
        ("keep_every", config.keep_every, 0, math.inf),
        ("seed", config.seed, 0, 2**63 - 1),
        ("data.seq_len", config.data.seq_len, 2, math.inf),
        ("data.micro_batch_size", config.data.micro_batch_size, 1, 65_536),
        ("eval_batches", config.eval_batches, 1, 65_536),
        ("model.num_layers", config.model.num_layers, 1, 4096),
        ("balance.bias_rate", config.balance.bias_rate, 0, 1),
        ("balance.sequence_loss", config.balance.sequence_loss, 0, 100),
        ("balance.aux_loss", config.balance.aux_loss, 0, 100),
        ("launch.processes", config.launch.processes, 0, 65_536),
        ("launch.device_gib", config.launch.device_gib, 1, 65_536),
        ("launch.threads", config.launch.threads, 0, 4096),
        ("schedule.micro_batches", config.schedule.micro_batches, 1, MAX_MICRO_BATCHES),
        ("schedule.max_activations", config.schedule.max_activations, 0, 1e6),
        ("schedule.effort", config.schedule.effort, 1, 10**9),
        ("parallel.pp", config.parallel.pp, 1, math.inf),
        ("parallel.ep", config.parallel.ep, 1, math.inf),
        ("parallel.ranks_per_node", config.parallel.ranks_per_node, 0, math.inf),
    ]
    for name, value, low, high in limits:
        if not low <= value <= high:
            bound = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise ValueError(f"{name}={value} must be {bound}")
    for name in ("rope_base", "route_scale", "norm_eps", "init_std"):
        if not 0 < getattr(config.model, name) < math.inf:
            raise ValueError(f"model.{name}={getattr(config.model, name)} must be positive")
    if not 0 < config.data.val_fraction < 1:
        raise ValueError(f"data.val_fraction={config.data.val_fraction} must be between 0 and 1, both excluded")
    if not 1 <= config.launch.timeout_seconds <= 86_400:
        raise ValueError(f"launch.timeout_seconds={config.launch.timeout_seconds} must be between 1 and 86400")


def _check_choices(config: Config) -> None:
    choices = [
        ("parallel.overlap", config.parallel.overlap, ("auto", "on", "off")),
        ("compile", config.compile, ("on", "off")),
        ("parallel.split", config.parallel.split, ("equal", "costs")),
        ("parallel.placement", config.parallel.placement, ("in_order", "loads")),
        ("logger.name", config.logger.name, ("wandb", "tensorboard", "wandb+tensorboard", "none")),
        ("logger.mode", config.logger.mode, ("offline", "online")),
        ("launch.device", config.launch.device, ("auto", "cpu", "cuda")),
        ("balance.force", config.balance.force, FORCES),
        ("resume", config.resume, ("auto", "never")),
    ]
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.run):
        raise ValueError(f"run={config.run!r} must be a plain name of letters, digits, '.', '_' and '-'")


def _check_machine(config: Config) -> None:
    """Does this machine have what is asked for?"""
    resolve_device(config.launch.device)
    if config.trace and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("trace=true draws pictures, which need matplotlib: pip install matplotlib")
    if "tensorboard" in config.logger.name:
        check_tensorboard()
    if config.optim.zero:
        check_deepspeed()
