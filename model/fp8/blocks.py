"""Weights in FP8 with one scale per 128 × 128 block, as the public checkpoint stores them (report 3.3).

weight ≈ quantised (float8_e4m3fn) · scale_inv of its block        scale_inv = largest |weight| of the block / 448
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0


def quantise_blocks(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(quantised [O, I] float8_e4m3fn, scale_inv [⌈O/128⌉, ⌈I/128⌉] float32). A block of zeros has scale 1."""
    O, I = weight_OI.shape  # noqa: E741
    tiles = _tiles(weight_OI.float())
    largest = tiles.abs().amax(dim=(1, 3))
    scale_inv = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    scaled = (tiles / scale_inv[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return scaled.flatten(0, 1).flatten(1)[:O, :I].contiguous(), scale_inv


def dequantise_blocks(quantised_OI: Tensor, scale_inv: Tensor) -> Tensor:
    """The weight in float32. Raises ValueError if the scales are not those of blocks of 128 × 128."""
    O, I = quantised_OI.shape  # noqa: E741
    wanted = scale_shape((O, I))
    if tuple(scale_inv.shape) != wanted:
        raise ValueError(f"scales of shape {tuple(scale_inv.shape)} for a weight of {O} × {I}; expected {wanted}")
    tiles = _tiles(quantised_OI.float())
    return (tiles * scale_inv.float()[:, None, :, None]).flatten(0, 1).flatten(1)[:O, :I].contiguous()


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def _tiles(matrix_OI: Tensor) -> Tensor:
    """[row blocks, 128, column blocks, 128], filled up with zeros."""
    rows, columns = scale_shape(tuple(matrix_OI.shape))
    O, I = matrix_OI.shape  # noqa: E741
    filled = F.pad(matrix_OI, (0, columns * BLOCK - I, 0, rows * BLOCK - O))
    return filled.view(rows, BLOCK, columns, BLOCK)
