"""From FP32 or BF16 to FP8 and back, with one scale for every few elements (report 3.3).

Why small groups. E4M3 has 4 exponent bits: below 2⁻⁶ its steps stop shrinking, below 2⁻¹⁰ everything is 0, above 448
there is nothing. That is a window of 2¹⁸, and activations have a few channels that are a hundred times larger than the
rest. One scale for the whole tensor moves those to the top of the window and much of the rest out at the bottom. So

    tiles   1 × 128: a token and 128 channels; an outlier spoils its own tile only    activations and their gradients
    blocks  128 × 128                                                                 weights, which have no outliers

Why E4M3 for everything, gradients too, where others take E5M2 for its range: the small groups share their exponent
range through the scale, so what is left to want is the third mantissa bit.

The groups lie along K, the dimension that a matrix product sums over: a partial sum over 128 of K then has one scale
on each side, and is multiplied with it when it is added up in FP32. A product of the transposed matrix (the weight
gradient sums over tokens) needs its groups along the other side, and the tensor quantised again: `quantize_transposed`.

    scale = largest |x| of the group / 448           1 if that is 0 (all zeros, or an underflow)
    value = x / scale, to nearest even               |value| ≤ 448 always
    power_of_two: scale rounded up to 2ⁿ             dividing and multiplying then change no mantissa bit, so a group
                                                     that is quantised again with power_of_two comes out unchanged

A group that holds an infinity or NaN gets the scale NaN, and so do all its elements: an overflow cannot hide in a
group and be rounded away; it reaches the loss or the gradient norm, where the training loop's guard looks for it.

Shapes: M, N, K as in a product [M, K] · [N, K]ᵀ; R rows of several experts, one after the other; P = R padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E8M0 = torch.float8_e8m0fnu  # a power-of-two scale in one byte: its exponent, or NaN


@dataclass(frozen=True)
class Quantized:
    """x ≈ values · scale of the element's group, groups of `group_rows` × 128.

    values  [..., M, K] float8_e4m3fn
    scales  [..., ⌈M / group_rows⌉, ⌈K / 128⌉] FP32; the last group of a row or column may be smaller

    Leading dimensions are those of stacked weights. Raises ValueError for scales of another shape.
    """

    values: Tensor
    scales: Tensor
    group_rows: int = 1

    def __post_init__(self) -> None:
        wanted = scale_shape(tuple(self.values.shape), self.group_rows)
        if tuple(self.scales.shape) != wanted:
            raise ValueError(
                f"scales of shape {tuple(self.scales.shape)} for values of shape {tuple(self.values.shape)} in groups "
                f"of {self.group_rows} × {TILE}; expected {wanted}"
            )

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    @property
    def row_scales(self) -> Tensor:
        """One row of scales for every row of values: [..., M, ⌈K / 128⌉]."""
        if self.group_rows == 1:
            return self.scales
        return self.scales.repeat_interleave(self.group_rows, dim=-2)[..., : self.values.shape[-2], :]

    def transposed(self) -> Quantized:
        """The transpose, as a view. Raises ValueError for tiles: their groups would lie along the wrong side."""
        if self.group_rows != TILE:
            raise ValueError(f"groups of {self.group_rows} × {TILE} have no transpose; use quantize_transposed")
        return Quantized(self.values.transpose(-1, -2), self.scales.transpose(-1, -2), TILE)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """values · scales, multiplied in FP32. In BF16 too this is exact for power-of-two scales."""
        halves, scales = _as_half(self.values), self.row_scales.unsqueeze(-1) * _HALF_UNIT
        out = torch.empty(self.values.shape, dtype=dtype, device=self.values.device)
        for part, half, scale in zip(_groups(out), _groups(halves), _split(scales, self.values.shape[-1]), strict=True):
            part.copy_(half * scale) if dtype != torch.float32 else torch.mul(half, scale, out=part)
        return out


def quantize_tiles(x_MK: Tensor, power_of_two: bool = False) -> Quantized:
    """In tiles of 1 × 128 along K; any leading dimensions."""
    high = x_MK.float()
    largest = torch.cat([part.abs().amax(-1) for part in _groups(high)], -1)
    return _with_scales(high, scales_for(largest, power_of_two), 1)


def quantize_blocks(w_NK: Tensor, power_of_two: bool = False) -> Quantized:
    """In blocks of 128 × 128; any leading dimensions (the experts of a stacked weight [E, N, K])."""
    high = w_NK.float()
    N, K = high.shape[-2:]
    filled = F.pad(high, (0, -K % TILE, 0, -N % TILE)) if N % TILE or K % TILE else high
    largest = filled.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE)).abs().amax((-1, -3))
    return _with_scales(high, scales_for(largest, power_of_two), TILE)


def quantize_transposed(x_RK: Tensor, counts: Sequence[int] | None = None, power_of_two: bool = False) -> Quantized:
    """The transpose [K, P] in tiles along the rows of x: 128 × 1 tiles of x.

    counts   rows of each expert (default: all of one). A tile must not mix experts, so every expert's rows are filled
             up with zeros to a multiple of 128; P is the sum of these. Zeros add nothing to a product over P.
    """
    padded_PK = pad_groups(x_RK.float(), [len(x_RK)] if counts is None else counts)
    tiles = padded_PK.unflatten(0, (-1, TILE))
    scales = scales_for(tiles.abs().amax(1), power_of_two)
    values = _to_e4m3(tiles / scales.unsqueeze(1)).flatten(0, 1)
    return Quantized(values.t(), scales.t())


def quantize_tensor(x_MK: Tensor) -> Quantized:
    """With one scale for the whole tensor: what tiles and blocks are compared with. Not used in training."""
    high = x_MK.float()
    scale = scales_for(high.abs().amax().reshape(1, 1), power_of_two=False)
    return _with_scales(high, scale.expand(scale_shape(tuple(x_MK.shape), 1)), 1)


def scales_for(largest: Tensor, power_of_two: bool) -> Tensor:
    """Scales for groups whose largest absolute values are these, FP32."""
    scales = largest / E4M3_MAX
    scales = torch.where(scales == 0, 1.0, scales)
    if power_of_two:  # up to the next one: any mantissa bit carries into the exponent, then the mantissa goes
        scales = ((scales.view(torch.int32) + 0x7FFFFF) & -0x800000).view(torch.float32)
    return torch.where(largest < float("inf"), scales, float("nan"))


def scale_shape(shape: tuple[int, ...], group_rows: int) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // group_rows), -(-shape[-1] // TILE))


def padded_counts(counts: Sequence[int]) -> list[int]:
    """Rows of each expert after `pad_groups`."""
    return [-(-count // TILE) * TILE for count in counts]


def pad_groups(x_RK: Tensor, counts: Sequence[int]) -> Tensor:
    """Every expert's rows filled up with zeros to a multiple of 128: [P, K]. Without need, x itself."""
    if not any(count % TILE for count in counts):
        return x_RK
    sizes = padded_counts(counts)
    out = x_RK.new_zeros(sum(sizes), x_RK.shape[1])
    for here, rows in zip(out.split(sizes), x_RK.split(list(counts)), strict=True):
        here[: len(rows)] = rows
    return out


# E4M3 is FP16 without some bits: same sign, exponent 4 instead of 5 bits with another bias, mantissa 3 instead of 10.
# Shifted into place the exponent is 8 too small, which the scale makes good. (torch's own cast takes ten times as
# long on a CPU. NaN becomes a number on this way; it is the scale's NaN that counts.)
_HALF_UNIT = 256.0


def _as_half(values: Tensor) -> Tensor:
    """values / 256 as FP16, exactly."""
    bits = values.view(torch.int8).to(torch.int16)
    return bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16)


def _with_scales(high: Tensor, scales: Tensor, group_rows: int) -> Quantized:
    result = torch.empty_like(high, memory_format=torch.contiguous_format)
    rows = scales if group_rows == 1 else scales.repeat_interleave(group_rows, dim=-2)[..., : high.shape[-2], :]
    parts = zip(_groups(result), _groups(high), _split(rows.unsqueeze(-1), high.shape[-1]), strict=True)
    for out, part, scale in parts:
        torch.div(part, scale, out=out)
    return Quantized(_to_e4m3(result), scales, group_rows)


def _to_e4m3(scaled: Tensor) -> Tensor:
    """Clamped first: what rounding of a tiny scale has pushed above 448 would be NaN on some devices."""
    return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)


def _groups(x: Tensor) -> list[Tensor]:
    """Views [..., groups, size]: whole groups of 128, then what is left over."""
    whole = x.shape[-1] // TILE * TILE
    parts = [x[..., :whole].unflatten(-1, (-1, TILE))] if whole or not x.shape[-1] else []
    return parts + ([x[..., whole:].unsqueeze(-2)] if whole < x.shape[-1] else [])


def _split(scales: Tensor, size: int) -> list[Tensor]:
    """Scales [..., groups, 1] in the parts of `_groups`."""
    whole = size // TILE
    parts = [scales[..., :whole, :]] if whole or not size else []
    return parts + ([scales[..., whole:, :]] if size % TILE else [])
