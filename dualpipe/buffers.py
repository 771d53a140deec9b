"""Receive buffers, reused: a step asks for the same few shapes again and again.

Nobody gives a buffer back. A received tensor may live on in an autograd graph, in a deferred weight gradient, in a
send of the same memory or in the user's module, and only the storage's own count of references knows them all. So
the pool keeps every buffer, hands out views, and takes one again when nobody else refers to its memory.
"""

from __future__ import annotations

from collections import defaultdict, deque

import torch
from torch import Tensor

from dualpipe.stage import TensorSpec

_ALONE = 2  # references to a storage that only the pool holds: the tensor and the handle to its storage
# torch's own count, as its CUDA-graph trees use it; a torch without it gets a fresh buffer each time.
_count = getattr(torch._C, "_storage_Use_Count", None)


class BufferPool:
    """Buffers by shape and dtype, on one device. It holds as many as were ever in use at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shelves: dict[TensorSpec, deque[tuple[Tensor, torch.UntypedStorage]]] = defaultdict(deque)

    def take(self, spec: TensorSpec) -> Tensor:
        """An uninitialised tensor that is the caller's until the last reference to its memory is gone."""
        if _count is None:
            return torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
        shelf = self._shelves[spec]
        for _ in range(len(shelf)):
            tensor, storage = shelf[0]
            shelf.rotate(-1)  # the one that was taken longest ago is the likeliest to be free
            if _count(storage._cdata) == _ALONE:
                return tensor.detach()
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
        shelf.append((tensor, tensor.untyped_storage()))
        return tensor.detach()

    def clear(self) -> None:
        """Forget all buffers: after a failed step, when messages may still be written into them."""
        self._shelves.clear()

    def __len__(self) -> int:
        """How many buffers there are, free or not."""
        return sum(map(len, self._shelves.values()))
