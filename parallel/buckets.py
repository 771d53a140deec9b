"""Buckets: parameters that are reduced, sharded and updated together, their gradients in one flat tensor.

A stage has up to three buckets in each type that it computes with: dense matrices (which decay), dense vectors (norms,
which do not), and routed experts; embedding and output head have one apart.
Each `.grad` is a view into its bucket, in FP32 or better whatever the weights are stored in. A bucket is padded so
that it divides evenly among the ranks that hold a copy of it; the i-th copy's share is the i-th slice. ZeRO-1, the
gradient norm, checkpoints and the average of weights all use that same slice, so every element has one owner.

Buckets come in the order in which a backward finishes them: last stage first. All copies have the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.layers import Toolbox
from model.names import expert_parameters, named_tensors
from parallel.mesh import Mesh

ALIGNMENT = 2  # elements; DeepSpeed pads to this times the number of copies (nccl_start_alignment_factor)

ENDS = ("embedding.weight", "head.weight")  # of the model


@dataclass(frozen=True)
class Piece:
    """One named tensor of the model in a bucket: its global name, its shape, and where it starts in the bucket."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class GradBucket:
    """
    stages      whose backwards add to it; it is final when all of them have done their last W
    routed      routed experts (else dense)
    decays      whether weight decay applies
    hidden      whether these are matrices inside the model (not embedding or output head): what Muon is for
    dtype       in which the model computes with these weights; ZeRO-1 stores them so, beside FP32 masters
    parameters  in the order of the bucket
    pieces      the same as named tensors: a stack of experts is one parameter and several pieces
    grads       [padded size]
    group       the ranks that hold a copy (None: this one alone)
    copies      how many those are
    index       this rank's place among them
    """

    stages: tuple[int, ...]
    routed: bool
    decays: bool
    hidden: bool
    dtype: torch.dtype
    parameters: tuple[nn.Parameter, ...]
    pieces: tuple[Piece, ...]
    grads: Tensor
    group: dist.ProcessGroup | None
    copies: int
    index: int

    @property
    def share(self) -> slice:
        """The slice of the bucket that this rank owns."""
        size = self.grads.numel() // self.copies
        return slice(self.index * size, (self.index + 1) * size)

    @property
    def numel(self) -> int:
        """Elements without the padding."""
        return sum(p.numel() for p in self.parameters)

    def offsets(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Each parameter and where it starts."""
        start = 0
        for parameter in self.parameters:
            yield parameter, start
            start += parameter.numel()

    def names(self) -> Iterator[tuple[nn.Parameter, str]]:
        """Each parameter with the name of its first piece."""
        first = {piece.start: piece.name for piece in self.pieces}
        for parameter, start in self.offsets():
            yield parameter, first[start]

    def restore_gradients(self) -> None:
        """Make every `.grad` a view into the bucket."""
        for parameter, start in self.offsets():
            parameter.grad_dtype = self.grads.dtype
            parameter.grad = self.grads[start : start + parameter.numel()].view_as(parameter)


@dataclass(frozen=True)
class _Key:
    stages: tuple[int, ...]
    routed: bool
    decays: bool
    hidden: bool
    dtype: torch.dtype
    tied: bool

    @property
    def order(self) -> tuple[bool, int, bool, bool, bool, str, tuple[int, ...]]:
        return self.tied, -self.stages[0], self.routed, not self.decays, not self.hidden, str(self.dtype), self.stages


def make_buckets(stages: Mapping[int, nn.Module], mesh: Mesh) -> list[GradBucket]:
    """The buckets of this rank. Replaces all `.grad`.

    A parameter that several stages of this rank share occurs once. An embedding that is also kept on another rank than
    its stage (for multi-token prediction, see `embedding_holders`) has a bucket of its own, the last.
    """
    holders: dict[nn.Parameter, list[int]] = {}
    for number in sorted(stages):
        for parameter in dict.fromkeys(stages[number].parameters()):
            holders.setdefault(parameter, []).append(number)
    members: dict[_Key, dict[nn.Parameter, list[tuple[str, tuple[int, ...]]]]] = {}
    for number in sorted(stages):
        stage = stages[number]
        experts = expert_parameters(stage)
        local = dict(stage.named_parameters(remove_duplicate=False))
        dtypes = compute_dtypes(stage)
        for name, tensor, owner in named_tensors(stage):
            weight = local.get(owner)
            if weight is None or holders[weight][0] != number:
                continue
            tied = mesh.tied is not None and owner == "embedding.weight"
            matrix = weight.dim() > 1
            hidden = matrix and owner not in ENDS
            key = _Key(tuple(holders[weight]), owner in experts, matrix, hidden, dtypes[weight], tied)
            names = members.setdefault(key, {}).setdefault(weight, [])
            if sum(torch.Size(shape).numel() for _, shape in names) < weight.numel():  # else a second name of it
                names.append((name, tuple(tensor.shape)))
    return [_bucket(key, members[key], mesh) for key in sorted(members, key=lambda k: k.order)]


def _bucket(key: _Key, named: Mapping[nn.Parameter, Sequence[tuple[str, tuple[int, ...]]]], mesh: Mesh) -> GradBucket:
    group = mesh.tied if key.tied else mesh.experts if key.routed else mesh.dense
    copies, index = (group.size(), group.rank()) if group is not None else (1, 0)
    parameters = tuple(named)
    device = parameters[0].device
    numel = sum(p.numel() for p in parameters)
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    grads = torch.zeros(padded(numel, copies), dtype=dtype, device=device)
    pieces, start = [], 0
    for parameter in parameters:
        for name, shape in named[parameter]:
            pieces.append(Piece(name, shape, start))
            start += torch.Size(shape).numel()
    bucket = GradBucket(
        key.stages,
        key.routed,
        key.decays,
        key.hidden,
        key.dtype,
        parameters,
        tuple(pieces),
        grads,
        group,
        copies,
        index,
    )
    bucket.restore_gradients()
    return bucket


def compute_dtypes(stage: nn.Module) -> dict[nn.Parameter, torch.dtype]:
    """In which type the model multiplies with each parameter: that of its module's precision, else its own."""
    dtypes: dict[nn.Parameter, torch.dtype] = {}
    for module in stage.modules():
        tools = getattr(module, "tools", None)
        for parameter in module.parameters(recurse=False):
            dtypes[parameter] = tools.precision.dtype if isinstance(tools, Toolbox) else parameter.dtype
    return dtypes


def padded(numel: int, copies: int) -> int:
    """The size of a bucket of `numel` elements that divides among its copies."""
    unit = ALIGNMENT * copies
    return -(-numel // unit) * unit
