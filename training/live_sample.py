"""Text from the weights that are being trained, where they are: no copy, no checkpoint, any layout.

All ranks call it together. The sequence passes through the stages in order; each stage is computed by one of the PP
ranks that hold it (by all its data-parallel ranks alike, so that expert parallelism works as in training), which hands
the hidden states on to the holder of the next. Every rank keeps the latent cache of the layers that it computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe.schedule import Schedule
from model.decode import DecodeBatch, Decoder, Piece
from model.generate import generate
from model.sampling import Sampling
from parallel.build import Replica


def sample_live(replica: Replica, prompt: Sequence[int], count: int, window: int, sampling: Sampling) -> Iterator[int]:
    """`count` tokens after the prompt, the same on every rank; collective. See `model.generate.generate`."""
    return generate(_LiveModel(replica, window).forward, prompt, count, window, sampling)


def holders(schedule: Schedule) -> list[int]:
    """For each stage the PP rank that computes it: the one of the stage before if it can, else the first that can."""
    chosen: list[int] = []
    for stage in range(schedule.num_stages):
        able = [pp for pp in range(schedule.num_ranks) if stage in schedule.stages_of(pp)]
        chosen.append(chosen[-1] if chosen and chosen[-1] in able else able[0])
    return chosen


class _LiveModel:
    def __init__(self, replica: Replica, window: int) -> None:
        self.replica, self.mesh = replica, replica.mesh
        self.holders = holders(replica.schedule)
        self.decoders = {
            number: Decoder(replica.stages[number], window)
            for number, pp in enumerate(self.holders)
            if pp == self.mesh.pp
        }

    def forward(self, piece: Piece) -> Tensor:
        """Logits [V] after the piece's last token, on every rank, in host memory."""
        stage = next(iter(self.replica.stages.values()))
        dtype, device = stage.tools.precision.dtype, stage.tools.device
        batch = DecodeBatch.of([piece], stage.config, torch.promote_types(dtype, torch.float32), device)
        hidden: Tensor | None = None
        for number, pp in enumerate(self.holders):
            if number and pp != self.holders[number - 1]:
                shape = (len(piece.tokens), stage.config.hidden_size)
                hidden = self._hand_on(hidden, shape, dtype, self.holders[number - 1], pp)
            if pp == self.mesh.pp:
                hidden = self.decoders[number].forward(batch, hidden)
        logits = torch.empty(stage.config.vocab_size, dtype=dtype)
        if self.mesh.pp == self.holders[-1]:
            assert hidden is not None
            logits = self.decoders[len(self.holders) - 1].logits(hidden[-1:])[0].cpu()
        if self.mesh.control is not None:
            dist.broadcast(logits, self.mesh.layout.rank(self.holders[-1], 0), group=self.mesh.control)
        return logits

    def _hand_on(
        self, hidden: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, source: int, target: int
    ) -> Tensor | None:
        layout, dp = self.mesh.layout, self.mesh.dp
        if self.mesh.pp == source:
            assert hidden is not None
            dist.send(hidden.cpu().contiguous(), layout.rank(target, dp), group=self.mesh.control)
        elif self.mesh.pp == target:
            arrived = torch.empty(shape, dtype=dtype)
            dist.recv(arrived, layout.rank(source, dp), group=self.mesh.control)
            return arrived.to(next(iter(self.replica.stages.values())).tools.device)
        return hidden
