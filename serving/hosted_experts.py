"""The routed experts that a rank serves, one per slot, each of which can be exchanged while the model runs.

What an expert gives for a token must not depend on where it is computed, or beside how many other tokens: a token of
a hot expert may meet any of its copies, each with another number of rows. Matrix libraries choose their kernel by the
number of rows, and kernels add up in different orders. So rows are computed in tiles of a few fixed heights, filled up
with zeros, and only heights are used of which a test at the start (`agreeing_heights`) has shown, on this machine and
for these shapes, that a row gets the same bits in each of them, wherever in the tile it is and whatever is beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from model.functional import make_kernels
from model.layers import Toolbox
from model.products import blocks

HEIGHTS = (4, 8, 16, 32, 64, 128)  # of tiles; multiples of each other


class SlotWeights(nn.Module):
    """The weights of one expert, never written after they were filled. gate_up [1, 2F, D], down [1, D, F]."""

    def __init__(self, hidden: int, ffn: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(1, 2 * ffn, hidden, dtype=dtype, device=device), requires_grad=False)
        self.down = nn.Parameter(torch.empty(1, hidden, ffn, dtype=dtype, device=device), requires_grad=False)

    def named(self, prefix: str) -> dict[str, Tensor]:
        """Its matrices under their global names: `prefix` is layer and expert, "layers.3.experts.17"."""
        return {f"{prefix}.gate_up.weight": self.gate_up.data[0], f"{prefix}.down.weight": self.down.data[0]}


class HostedExperts(nn.Module):
    """In the place of `model.layer.Experts`. heights: of tiles, ascending; the smallest divides the others.

    rows   how many rows were computed so far
    """

    def __init__(self, slots: Sequence[SlotWeights], tools: Toolbox, heights: Sequence[int]) -> None:
        super().__init__()
        self.slots = nn.ModuleList(slots)
        self.tools, self.heights = tools, tuple(heights)
        self.rows = 0
        self._gate_up, self._down = (tools.precision.of(f"experts_{name}") for name in ("gate_up", "down"))
        self._kernels = make_kernels(tools.compile)

    def forward(self, x_RD: Tensor, gates_R: Tensor, counts: Sequence[int]) -> Tensor:
        """Each row through the expert of its slot, times its gate → [R, D]. Rows come sorted by slot."""
        self.rows += len(x_RD)
        if not len(x_RD):
            return x_RD
        height = self.heights[0]
        starts, total = [0] * len(counts), 0
        for slot, rows in blocks(counts):
            starts[slot] = total - rows.start
            total += -(-(rows.stop - rows.start) // height) * height
        places_R = torch.arange(len(x_RD), device=x_RD.device)
        places_R += torch.repeat_interleave(torch.tensor(starts), torch.tensor(counts)).to(x_RD.device)
        x_PD, gates_P = x_RD.new_zeros(total, x_RD.shape[1]), gates_R.new_zeros(total)
        x_PD[places_R], gates_P[places_R] = x_RD, gates_R
        y_PD = torch.empty_like(x_PD)
        for slot, rows in blocks(counts):
            start = starts[slot] + rows.start
            for size in tiles(rows.stop - rows.start, self.heights):
                tile = slice(start, start + size)
                y_PD[tile] = self.tile(slot, x_PD[tile], gates_P[tile])
                start += size
        return y_PD[places_R]

    @property
    def held(self) -> list[SlotWeights]:
        """What is in each slot."""
        return [held for held in self.slots if isinstance(held, SlotWeights)]

    def tile(self, slot: int, x_HD: Tensor, gates_H: Tensor) -> Tensor:
        """One product of a fixed height."""
        weights, height, queue = self.slots[slot], [len(x_HD)], self.tools.queue
        assert isinstance(weights, SlotWeights)
        both = self._gate_up.grouped_linear(x_HD, weights.gate_up, height, queue)
        return self._down.swiglu_linear(both, gates_H, weights.down, height, self._kernels, queue)

    def put(self, slots: Sequence[SlotWeights]) -> None:
        """Let the slots hold these experts from now on."""
        gone = {id(held): held for held in self.held if all(held is not new for new in slots)}
        for held in gone.values():
            for parameter in held.parameters():
                self.tools.precision.forget(parameter)
        self.slots = nn.ModuleList(slots)


def tiles(rows: int, heights: Sequence[int]) -> list[int]:
    """Heights that together are the number of rows, rounded up to the smallest: tall ones first."""
    left, found = -(-rows // heights[0]) * heights[0], []
    for height in reversed(heights):
        found += [height] * (left // height)
        left %= height
    return found


Tile = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def agreeing_heights(tile: Tile, hidden: int, dtype: torch.dtype, device: torch.device | str) -> tuple[int, ...]:
    """Those of HEIGHTS in which a row gets the same bits, in each at every place; (1,) if there is none.

    tile   (x [H, D], gates [H]) → [H, D], as `HostedExperts.tile`
    Sure as far as a library's choice of kernel depends on shapes and not on values, and rows do not mix.
    """
    generator = torch.Generator().manual_seed(0)
    tall = HEIGHTS[-1]
    x = torch.randn(tall, hidden, generator=generator, dtype=torch.float64).to(dtype=dtype, device=device)
    gates = torch.rand(tall, generator=generator).to(device)
    for most in reversed(HEIGHTS):
        wanted = _by_tiles(tile, x, gates, most)
        if not _same_anywhere(tile, x, gates, most, wanted):
            continue
        return tuple(
            h for h in HEIGHTS if h <= most
            and torch.equal(_by_tiles(tile, x, gates, h), wanted) and _same_anywhere(tile, x, gates, h, wanted)
        )  # fmt: skip
    return (1,)


def _by_tiles(tile: Tile, x: Tensor, gates: Tensor, height: int) -> Tensor:
    pairs = zip(x.split(height), gates.split(height), strict=True)
    return torch.cat([tile(some, weights).clone() for some, weights in pairs])


def _same_anywhere(tile: Tile, x: Tensor, gates: Tensor, height: int, wanted: Tensor) -> bool:
    """Whether rows keep their bits when all move on by one place, and when every other row is zeros."""
    moved = _by_tiles(tile, x.roll(1, 0), gates.roll(1, 0), height)
    if not torch.equal(moved.roll(-1, 0), wanted):
        return False
    sparse = x.clone()
    sparse[1::2] = 0
    return torch.equal(_by_tiles(tile, sparse, gates, height)[::2], wanted[::2])
