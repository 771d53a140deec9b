"""AdamW with the report's hyper-parameters, and the learning rate as a pure function of the step (report 4.2).

Matrices and the embedding decay, norms do not. The optimizer works on whole buckets (parallel/buckets.py), in FP32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from parallel.build import Replica
from parallel.update import FlatOptimizer, ParamGroup, ReplicatedUpdate, Update
from parallel.zero import ShardedUpdate
from training.adamw import AdamW, LowPrecisionAdamW
from training.muon import Muon


@dataclass
class OptimConfig:
    """Learning rate: 0 → lr over warmup_steps, constant for constant_fraction of the rest, cosine down to lr_final."""

    name: str = "adamw"  # adamw | muon (hidden matrices; the rest AdamW)
    momentum: float = 0.95  # of Muon
    lr: float = 3e-3
    lr_final: float = 3e-4
    warmup_steps: int = 40
    constant_fraction: float = 0.5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # global gradient norm; 0 = no clipping
    zero: int = 0  # 1: optimizer state is shared out among the copies of a parameter, through DeepSpeed
    moments: str = "auto"  # fp32 | bf16 (stochastically rounded) | auto: bf16 with precision=fp8 (report 3.3.3)
    ema: float = 0.0  # decay per step of a moving average of the weights, kept on the CPU; 0 = none

    def check(self) -> None:
        """Raise ValueError, naming the override, for values that cannot train."""
        for name in ("lr", "eps"):  # without eps a weight that has had no gradient yet becomes 0 / 0
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be positive")
        if not 0 <= self.lr_final <= self.lr:
            raise ValueError(f"optim.lr_final={self.lr_final} must be between 0 and optim.lr={self.lr}")
        for name in ("beta1", "beta2", "ema", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be in [0, 1)")
        for name in ("warmup_steps", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be 0 or more")
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optim.name={self.name!r} is unknown; choose adamw or muon")
        if self.zero not in (0, 1):
            raise ValueError(f"optim.zero={self.zero} is unknown; choose 0 or 1")
        if self.moments not in ("auto", "fp32", "bf16"):
            raise ValueError(f"optim.moments={self.moments!r} is unknown; choose fp32 or bf16, or auto")
        if not 0 <= self.constant_fraction <= 1:
            raise ValueError(f"optim.constant_fraction={self.constant_fraction} must be in [0, 1]")


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate for step 0, 1, …: warm-up, constant, cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    rest = max(1, total_steps - config.warmup_steps)
    decay_start = config.warmup_steps + config.constant_fraction * rest
    progress = min(1.0, max(0.0, (step + 1 - decay_start) / max(1.0, total_steps - decay_start)))
    return config.lr_final + (config.lr - config.lr_final) * 0.5 * (1 + math.cos(math.pi * progress))


def with_moments(config: OptimConfig, precision: str) -> OptimConfig:
    """The same with moments that are decided: auto goes by the name of the precision."""
    if config.moments != "auto":
        return config
    return replace(config, moments="bf16" if precision == "fp8" else "fp32")


def make_update(replica: Replica, config: OptimConfig, seed: int = 0) -> Update:
    """The optimizer of a rank over its gradient buckets; collective.

    One process has nothing to share its state with, so there `zero=1` is plain too.
    """
    kind = ShardedUpdate if config.zero == 1 and replica.mesh.layout.world > 1 else ReplicatedUpdate
    return kind(replica.buckets, replica.mesh, partial(make_flat, config, seed))


def make_flat(config: OptimConfig, seed: int, groups: list[ParamGroup]) -> FlatOptimizer:
    for group in groups:
        group["weight_decay"] = config.weight_decay if group["bucket"].decays else 0.0
    betas = (config.beta1, config.beta2)
    if config.name == "muon":
        moments = torch.bfloat16 if config.moments == "bf16" else groups[0]["bucket"].grads.dtype
        return Muon(groups, betas, config.eps, seed, moments, config.momentum)
    if config.moments == "bf16":
        return LowPrecisionAdamW(groups, betas, config.eps, seed)
    return AdamW(groups, betas, config.eps)
