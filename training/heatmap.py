"""A table of numbers, layer by layer, and its picture: a heat map that needs no plotting library.

Blue is below the neutral value, white at it, red above. Drawing is a table look-up on the numbers, so that a run may
show its expert loads often without paying for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BLUE, _WHITE, _RED = (33, 76, 160), (250, 250, 250), (178, 32, 44)


@dataclass(frozen=True)
class HeatMap:
    """rows: a name each, e.g. of a layer; values [rows, columns].

    around_mean   white is the row's mean and full red twice that; otherwise white is 0 and full colour the largest
                  absolute value
    """

    rows: tuple[str, ...]
    values: Sequence[Sequence[float]]
    around_mean: bool = True

    def image(self, width: int = 640, row_height: int = 18) -> np.ndarray:
        """RGB [height, width, 3], uint8, with one pixel of white between the rows; the cells fill the width."""
        values = np.array(self.values, dtype=np.float64).reshape(len(self.rows), -1)
        neutral = values.mean(1, keepdims=True) if self.around_mean else np.zeros((len(values), 1))
        span = neutral if self.around_mean else np.abs(values).max(initial=0.0)
        heat = np.clip((values - neutral) / np.maximum(span, 1e-30), -1, 1)[..., None]
        white = np.array(_WHITE)
        toward = np.where(heat < 0, np.array(_BLUE), np.array(_RED))
        cells = (white + np.abs(heat) * (toward - white)).round().astype(np.uint8)
        columns = np.arange(max(width, cells.shape[1])) * cells.shape[1] // max(width, cells.shape[1])
        picture = np.repeat(cells[:, columns], row_height, axis=0)
        picture[row_height - 1 :: row_height] = 255
        return picture
