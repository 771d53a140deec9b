"""Rotary position (RoPE): turn pairs of channels by an angle that grows with the position; and YaRN, its extension.

Channels 2j and 2j+1 form a pair and turn by position · base^(−2j/dim). The product of a query and a key then
depends on the distance of their positions alone. DeepSeek-V3 applies it to a small decoupled part of each query
head and to one key part that all heads share (report 2.1.1).

YaRN (arXiv 2309.00071; report 4.3) stretches a trained model to s times its length. Pairs that turn more than
`rope_beta_fast` times within the original length are left alone: they tell neighbours apart. Pairs that turn less
than `rope_beta_slow` times would leave the angles they were trained on, and are slowed down by s; in between there
is a ramp. Longer rows spread attention thinner, so the scores are sharpened by (0.1 · mscale_all_dim · ln s + 1)².
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import ModelConfig


def rotation(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions [...]: each [..., rope_dim/2]. Angles are made in FP64: positions get large."""
    frequencies = rope_frequencies(config).to(positions.device)
    angles = positions.to(torch.float64).unsqueeze(-1) * frequencies
    length = 1.0
    if config.rope_factor > 1:
        mscales = (config.rope_mscale, config.rope_mscale_all_dim)
        numerator, denominator = (_mscale(config.rope_factor, weight) for weight in mscales)
        length = numerator / denominator
    return (angles.cos() * length).to(dtype), (angles.sin() * length).to(dtype)


def softmax_scale(config: ModelConfig) -> float:
    """What the products of queries and keys are multiplied with: 1/√dim, and YaRN's sharpening."""
    scale = (config.head_dim + config.rope_dim) ** -0.5
    if config.rope_factor > 1:
        scale *= _mscale(config.rope_factor, config.rope_mscale_all_dim) ** 2
    return scale


def rope_frequencies(config: ModelConfig) -> Tensor:
    """The angle per position of each channel pair, in FP64: [rope_dim/2]."""
    c, pairs = config, config.rope_dim // 2
    index = torch.arange(pairs, dtype=torch.float64)
    plain = c.rope_base ** (-2 * index / c.rope_dim)
    if c.rope_factor <= 1:
        return plain
    first = max(0, math.floor(_pair_that_turns(c.rope_beta_fast, c)))
    last = min(c.rope_dim - 1, math.ceil(_pair_that_turns(c.rope_beta_slow, c)))
    slowed = ((index - first) / max(last - first, 1e-3)).clamp(0, 1)
    return plain * (1 - slowed) + plain / c.rope_factor * slowed


def _pair_that_turns(times: float, config: ModelConfig) -> float:
    """The (fractional) index of the pair that turns so many times within the original length."""
    wavelength = config.rope_original_length / times
    return config.rope_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_base))


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs of x [..., dim] by the angles [..., dim/2], in place; returns x."""
    pairs = x.unflatten(-1, (-1, 2))
    if _can_be_complex(pairs):
        torch.view_as_complex(pairs).mul_(torch.complex(cos, sin))  # one pass over memory instead of eight
        return x
    even, odd = pairs.unbind(-1)
    turned_even = even * cos - odd * sin
    turned_odd = even * sin + odd * cos
    even.copy_(turned_even)
    odd.copy_(turned_odd)
    return x


def _can_be_complex(pairs: Tensor) -> bool:
    *strides, last = pairs.stride()
    even = all(stride % 2 == 0 for stride in (*strides, pairs.storage_offset()))
    return pairs.dtype in (torch.float32, torch.float64) and last == 1 and even
