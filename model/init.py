"""Initial weights as a pure function of (seed, global name): every layout starts from the same model.

Matrices and the embedding are normal with the configured standard deviation (report 4.2: 0.006 at full size),
norms are one. Every routed expert has its own name, so a rank that holds only some of them draws just those.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from model.names import named_tensors


@torch.no_grad()
def initialise(stage: nn.Module, seed: int, std: float) -> None:
    """Fill the parameters of a stage in place."""
    parameters = {name for name, _ in stage.named_parameters()}
    for name, tensor, owner in named_tensors(stage):
        if owner not in parameters or tensor.is_meta:  # on the meta device there is nothing to fill
            continue
        if tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.copy_(_normal(name, tuple(tensor.shape), seed) * std)


def _normal(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)
