"""AdamW with the report's hyper-parameters, and the learning rate as a pure function of the step (report 4.2).

Matrices and the embedding decay, norms do not. The parameters are the FP32 master weights, so torch's own AdamW
does the whole work; the order of the parameters is that of the global names, the same on all copies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class OptimConfig:
    """Learning rate: 0 → lr over warmup_steps, constant for constant_fraction of the rest, cosine down to lr_final."""

    lr: float = 3e-3
    lr_final: float = 3e-4
    warmup_steps: int = 40
    constant_fraction: float = 0.5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # global gradient norm; 0 = no clipping

    def check(self) -> None:
        """Raise ValueError, naming the override, for values that cannot train."""
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optim.lr={self.lr} must be positive")
        if not 0 <= self.lr_final <= self.lr:
            raise ValueError(f"optim.lr_final={self.lr_final} must be between 0 and optim.lr={self.lr}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be in [0, 1)")
        for name in ("warmup_steps", "weight_decay", "clip", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be 0 or more")
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


def make_optimizer(stages: Mapping[int, nn.Module], config: OptimConfig) -> torch.optim.AdamW:
    """One AdamW over all stages of this rank. Gradients are set beforehand (parallel/grads.py) and kept."""
    each_once = dict.fromkeys(p for number in sorted(stages) for p in stages[number].parameters())
    parameters = list(each_once)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
