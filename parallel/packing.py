"""Several columns of rows as one block of bytes, so that they travel in one message.

A row of the block holds one row of every column, each starting at a multiple of 8 bytes, so that the columns can be
read in place: `unpack` makes views and copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 8  # bytes; the widest element type


@dataclass(frozen=True)
class Columns:
    """Width (elements per row) and dtype of each column."""

    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def of(columns: Sequence[Tensor]) -> Columns:
        """The layout of columns of shape [rows, width]."""
        return Columns(tuple(c.shape[1] for c in columns), tuple(c.dtype for c in columns))

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each column starts, in bytes; the last number is the width of a row."""
        sizes = (w * d.itemsize for w, d in zip(self.widths, self.dtypes, strict=True))
        return tuple(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))

    def block(self, rows: int, device: torch.device) -> Tensor:
        """An empty block of bytes for that many rows."""
        return torch.empty(rows, self.starts[-1], dtype=torch.uint8, device=device)

    def unpack(self, block: Tensor) -> tuple[Tensor, ...]:
        """Views of the block: one [rows, width] per column."""
        return tuple(
            block[:, start : start + width * dtype.itemsize].view(dtype)
            for start, width, dtype in zip(self.starts, self.widths, self.dtypes, strict=False)
        )

    def pack(self, columns: Sequence[Tensor], index_N: Tensor | None = None) -> Tensor:
        """A block with the rows `index_N` of the columns (all of them, if not given)."""
        rows = len(columns[0]) if index_N is None else len(index_N)
        block = self.block(rows, columns[0].device)
        for column, place in zip(columns, self.unpack(block), strict=True):
            place.copy_(column if index_N is None else column.index_select(0, index_N))
        return block
