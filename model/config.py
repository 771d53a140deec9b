"""The shape of a DeepSeek-V3 model (report sections 2 and 4.2), and what makes one valid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class ModelConfig:
    """Sizes of the network. The defaults are the `tiny` preset of the quickstart; see conf/model/ for others."""

    vocab_size: int = 257  # 256 bytes and the end-of-document token
    num_layers: int = 4
    num_dense_layers: int = 1  # the first layers have a dense MLP instead of experts
    hidden_size: int = 128
    dense_ffn_size: int = 384
    # Multi-head latent attention (2.1.1). query_rank 0 means: queries are not compressed.
    num_heads: int = 4
    query_rank: int = 64
    key_value_rank: int = 48
    head_dim: int = 32  # without position: "nope"
    rope_dim: int = 16  # decoupled rotary part
    value_dim: int = 32
    rope_base: float = 10_000.0
    # YaRN (4.3), which stretches a trained model to rope_factor times rope_original_length; 1 = off. See model/rope.py.
    rope_factor: float = 1.0
    rope_original_length: int = 4096
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_mscale: float = 1.0
    rope_mscale_all_dim: float = 1.0
    # DeepSeekMoE (2.1.2)
    num_experts: int = 16
    experts_per_token: int = 4
    num_shared_experts: int = 1
    expert_ffn_size: int = 96
    num_groups: int = 4  # of experts; a group is a node
    groups_per_token: int = 2
    route_scale: float = 2.5
    # Multi-token prediction (2.2): so many further tokens are predicted, each by a module with one layer of its own.
    mtp_depth: int = 0
    # Make the wide queries, keys and values again in backward instead of keeping them (3.2.3).
    recompute: bool = False
    # Numerics
    norm_eps: float = 1e-6
    init_std: float = 0.02

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    def check(self) -> None:
        """Raise ValueError, naming the override that mends it, unless the sizes fit together."""
        for name, value in vars(self).items():
            least = 0 if name in _MAY_BE_ZERO else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ValueError(f"model.{name}={value} must be at least {least}")
        if self.rope_dim % 2:
            raise ValueError(f"model.rope_dim={self.rope_dim} must be even: rotary position turns pairs of channels")
        self._check_yarn()
        if self.num_dense_layers > self.num_layers:
            raise ValueError(
                f"model.num_dense_layers={self.num_dense_layers} exceeds model.num_layers={self.num_layers}"
            )
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"model.num_experts={self.num_experts} is not divisible by model.num_groups={self.num_groups}"
            )
        if self.groups_per_token > self.num_groups:
            raise ValueError(
                f"model.groups_per_token={self.groups_per_token} exceeds model.num_groups={self.num_groups}"
            )
        reachable = self.groups_per_token * self.num_experts // self.num_groups
        if self.experts_per_token > reachable:
            raise ValueError(
                f"model.experts_per_token={self.experts_per_token}, but the {self.groups_per_token} groups that a "
                f"token may use hold only {reachable} experts; raise model.groups_per_token"
            )

    def _check_yarn(self) -> None:
        if not 1 <= self.rope_factor < math.inf:
            raise ValueError(f"model.rope_factor={self.rope_factor} must be at least 1 (1 = no YaRN)")
        if not 0 < self.rope_beta_slow <= self.rope_beta_fast < math.inf:
            raise ValueError(
                f"model.rope_beta_slow={self.rope_beta_slow} and model.rope_beta_fast={self.rope_beta_fast} must be "
                f"positive, slow at most fast"
            )
        for name in ("rope_mscale", "rope_mscale_all_dim"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"model.{name}={getattr(self, name)} must be 0 or more")


_MAY_BE_ZERO = frozenset({"num_dense_layers", "query_rank", "num_shared_experts", "mtp_depth"})


def split_layers(config: ModelConfig, num_stages: int, layers_per_stage: Sequence[int] | None = None) -> list[range]:
    """The layers of each stage: as given, or equal with the remainder in the middle.

    The first stage also carries the embedding and the last one the head, so spare layers go to stages between them.
    Raises ValueError if the list does not fit the model or a stage would be empty.
    """
    if layers_per_stage:
        if (
            len(layers_per_stage) != num_stages
            or sum(layers_per_stage) != config.num_layers
            or min(layers_per_stage) < 1
        ):
            raise ValueError(
                f"parallel.layers_per_stage={list(layers_per_stage)} must be {num_stages} positive numbers that add up "
                f"to model.num_layers={config.num_layers}"
            )
        sizes = list(layers_per_stage)
    else:
        if config.num_layers < num_stages:
            raise ValueError(
                f"model.num_layers={config.num_layers} cannot fill {num_stages} stages; "
                f"lower parallel.pp or raise model.num_layers"
            )
        sizes = [config.num_layers // num_stages] * num_stages
        middle_first = sorted(range(num_stages), key=lambda s: (abs(2 * s - num_stages + 1), s))
        for stage in middle_first[: config.num_layers % num_stages]:
            sizes[stage] += 1
    starts = [sum(sizes[:s]) for s in range(num_stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
