"""Micro-batches of packed documents, as a pure function of (seed, step).

Packing. The documents of a split lie end to end in one token stream, each closed by EOD. Row i is the window of
`seq_len` tokens from i·seq_len, so no token is padding; a long document runs over several rows, a short one shares
its row. What follows an EOD is unrelated to it: the target there is IGNORE, the document number goes up, so that
attention stays inside, and positions start again from 0. The rows' windows do not overlap, so an epoch trains on
every token once.

Order. Training reads an endless stream of samples: epoch after epoch, each a fresh permutation of all rows
(`order.permute`). Step t takes samples [t·G, (t+1)·G) of it, G being the global batch. Micro-batch m of DP rank d
takes the piece number m·dp_size + d, so the pieces depend on the layout only in who computes them. Nothing is
remembered from step to step: a resumed run, in whatever layout, asks for the next step and gets it.

Shape legend: B rows (sequences), S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.batch import IGNORE, MicroBatch
from model.tokenizer import EOD
from training.order import mix, permute


class PackedDataset:
    """The rows of one split, and their order.

    tokens   the token stream, e.g. `Corpus.tokens("train")`; a memory map stays on disk.
    Raises ValueError when seq_len is under 2, or when the stream is too short for one row and its last target.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int, eod: int = EOD) -> None:
        if seq_len < 2:
            raise ValueError(f"data.seq_len={seq_len} is too short to predict anything; use data.seq_len=2 or more")
        if len(tokens) <= seq_len:
            raise ValueError(
                f"this split has {len(tokens)} tokens, data.seq_len={seq_len} needs {seq_len + 1}; lower data.seq_len, "
                f"give more text, or change data.val_fraction"
            )
        self.tokens = tokens
        self.seq_len = seq_len
        self.seed = seed
        self.eod = eod
        self.num_rows = (len(tokens) - 1) // seq_len  # the last target needs one token more

    def row_of(self, sample: int) -> int:
        """The row that the given sample of the endless training stream reads."""
        epoch, index = divmod(sample, self.num_rows)
        return permute(index, self.num_rows, mix(self.seed, epoch))

    def micro_batch(self, rows: Sequence[int]) -> MicroBatch:
        """The given rows, in that order, with their targets and document boundaries: four tensors [B, S]."""
        S = self.seq_len
        window = np.stack([self.tokens[row * S : row * S + S + 1] for row in rows]).astype(np.int64)
        tokens_BS, next_BS = window[:, :-1], window[:, 1:]
        ends_BS = tokens_BS == self.eod
        starts_BS = np.zeros_like(ends_BS)
        starts_BS[:, 1:] = ends_BS[:, :-1]
        here_S = np.arange(S)
        start_BS = np.maximum.accumulate(np.where(starts_BS, here_S, 0), axis=1)
        return MicroBatch(
            tokens_BS=_tensor(tokens_BS),
            targets_BS=_tensor(np.where(ends_BS, IGNORE, next_BS)),
            documents_BS=_tensor(starts_BS.cumsum(axis=1)),
            positions_BS=_tensor(here_S - start_BS),
        )

    def sample(self, index: int) -> MicroBatch:
        """The index-th sample of the training stream, alone: four tensors [1, S]."""
        return self.micro_batch([self.row_of(index)])


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: `num_micro_batches` per DP rank, of `micro_batch_size` rows each."""

    micro_batch_size: int
    num_micro_batches: int
    dp_size: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    @property
    def global_batch_size(self) -> int:
        return self.dp_size * self.num_micro_batches * self.micro_batch_size

    def pieces(self, dp_rank: int) -> list[range]:
        """For each micro-batch of a DP rank, its places in the global batch."""
        if not 0 <= dp_rank < self.dp_size:
            raise ValueError(f"dp_rank={dp_rank} is outside [0, {self.dp_size})")
        size = self.micro_batch_size
        firsts = ((m * self.dp_size + dp_rank) * size for m in range(self.num_micro_batches))
        return [range(first, first + size) for first in firsts]

    def step_batch(self, dataset: PackedDataset, step: int, dp_rank: int = 0) -> list[MicroBatch]:
        """What one DP rank trains on in the given step, counted from 0, if all steps are of this size."""
        if step < 0:
            raise ValueError(f"step={step} must not be negative")
        return self.batch_at(dataset, step * self.global_batch_size, dp_rank)

    def batch_at(self, dataset: PackedDataset, first: int, dp_rank: int = 0) -> list[MicroBatch]:
        """What one DP rank trains on in the step that begins with sample `first` of the training stream."""
        return [dataset.micro_batch([dataset.row_of(first + i) for i in piece]) for piece in self.pieces(dp_rank)]

    def validation_batch(self, dataset: PackedDataset, dp_rank: int = 0) -> list[MicroBatch]:
        """One global batch of rows spread evenly over the split: the same rows every time.

        A split with fewer rows than that gives each of them as equally often as the numbers allow.
        """
        total = self.global_batch_size
        rows = [i * dataset.num_rows // total for i in range(total)]
        return [dataset.micro_batch([rows[i] for i in piece]) for piece in self.pieces(dp_rank)]
