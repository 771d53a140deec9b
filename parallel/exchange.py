"""One asynchronous all-to-all of uneven blocks of rows, on any backend.

Gloo's own all-to-all posts its sends first. On a slow link the permission to send then queues behind the data that
goes the other way, and the two directions take turns: 76 ms instead of 40 for 2 MB at 400 Mbit/s, each way. So on
gloo the receives are posted first, as messages from rank to rank, and the link is full duplex. (benchmarks/overlap.py
shows both.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch.distributed as dist
from torch import Tensor


class Works:
    """Several operations under way, as one."""

    def __init__(self, works: Sequence[Any]) -> None:
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def all_to_all(out: Tensor, block: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Works:
    """Start sending `sent[r]` rows of `block` to each rank r of the group and receiving `received[r]` rows into `out`.

    Both tensors must stay as they are until the result has been waited for. Collective: ranks of a group start their
    exchanges in the same order.
    """
    if dist.get_backend(group) != "gloo":
        return Works([dist.all_to_all_single(out, block, received, sent, group=group, async_op=True)])
    rank, size = group.rank(), group.size()
    arriving = _blocks(out, received)
    leaving = _blocks(block, sent)
    arriving[rank].copy_(leaving[rank])
    others = [(rank + step) % size for step in range(1, size)]
    works = [dist.irecv(arriving[r], group=group, group_src=r) for r in reversed(others) if received[r]]
    works += [dist.isend(leaving[r], group=group, group_dst=r) for r in others if sent[r]]
    return Works(works)


def _blocks(rows: Tensor, counts: list[int]) -> list[Tensor]:
    ends = accumulate(counts)
    return [rows[end - count : end] for count, end in zip(counts, ends, strict=True)]
