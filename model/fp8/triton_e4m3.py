"""What every Triton kernel here needs: the scale of a tile, and the rounding to E4M3.

The kernels are for Hopper and Blackwell, which round FP32 to E4M3 in one instruction. Triton's interpreter
(TRITON_INTERPRET=1 in the environment before the import) runs them on CPU tensors, slowly: that is how they are tested.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.fp8 import quantize

E4M3_MAX = tl.constexpr(quantize.E4M3_MAX)
WIDTH = tl.constexpr(quantize.TILE)
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)

# The interpreter's cast to float8_e4m3fn drops the carry of the mantissa, rounds ties away from zero and makes 384 of
# NaN (triton issue 8322). There we round to the grid of E4M3 ourselves, and leave nothing for the cast to round.
INTERPRETED: bool = triton.knobs.runtime.interpret


@triton.jit
def tile_scale(x, AXIS: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Largest |x| along an axis / 448; 1 if that is zero, NaN if a value is infinite or NaN."""
    size = tl.abs(x)
    scale = tl.div_rn(tl.max(size, AXIS), tl.full([], E4M3_MAX, tl.float32))
    if POWER_OF_TWO:  # up: one more than the largest mantissa carries into the exponent
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    finite = tl.min((size <= FLOAT_MAX).to(tl.int32), AXIS)
    return tl.where(finite == 0, float("nan"), tl.where(scale > 0, scale, 1.0))


@triton.jit
def to_e4m3(x, PREROUND: tl.constexpr):
    """Round to the nearest E4M3 value, ties to even; what is beyond ±448 becomes ±448, NaN stays NaN."""
    if PREROUND:
        size = tl.abs(x)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)  # 3 bits of mantissa
        subnormal = (size + 24576.0) - 24576.0  # FP32 numbers near 1.5 · 2^14 are 2^-9 apart, as E4M3's smallest are
        rounded = tl.minimum(tl.where(size < 0.015625, subnormal, normal), E4M3_MAX)
        byte = tl.where(x != x, 0x7F, rounded.to(tl.float8e4nv).to(tl.uint8, bitcast=True))
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        return (byte | sign).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)
