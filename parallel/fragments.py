"""Sharded saving and loading by global name, on torch.distributed.checkpoint (DCP).

A rank holds *fragments*: runs of elements of flattened, named tensors. They are what ZeRO-1 leaves of a tensor on a
rank, cut anywhere; DTensor's placements cannot describe them, DCP's plans can. On disk a tensor is one-dimensional and
made of chunks, written by whoever owned them; a reader asks for the fragments that it needs, cut as it likes, and DCP
finds the overlaps. So nothing is gathered, every element is written once (checked before anything is written), and a
checkpoint says nothing about ranks. The true shapes travel in DCP's metadata.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from model.names import named_tensors
from parallel.mesh import Mesh
from parallel.update import Shard


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + len(values)) of the flattened tensor `name` of `shape`; `values` is where they live."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.start

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.values.numel()]))


# -- what a rank holds ---------------------------------------------------------------------------------------------


def optimizer_fragments(shards: Iterable[Shard], owned: bool) -> Iterator[Fragment]:
    """Masters under the names of the weights, moments as `exp_avg.<name>`: those that this rank owns (to save) or all
    that it holds (to load)."""
    for shard in shards:
        part = shard.bucket.share if owned else shard.held
        tensors = {"": shard.master, **{f"{moment}.": values for moment, values in shard.moments.items()}}
        for prefix, values in tensors.items():
            yield from bucket_fragments(shard, prefix, shard.owned(values) if owned else values, part)


def bucket_fragments(shard: Shard, prefix: str, values: Tensor, part: slice) -> Iterator[Fragment]:
    """The named pieces of the values that stand for the slice `part` of a bucket."""
    for piece in shard.bucket.pieces:
        first, last = max(part.start, piece.start), min(part.stop, piece.start + piece.numel)
        if first < last:
            view = values[first - part.start : last - part.start]
            yield Fragment(prefix + piece.name, piece.shape, first - piece.start, view)


def buffer_fragments(stages: Mapping[int, nn.Module], mesh: Mesh, owned: bool) -> Iterator[Fragment]:
    """Buffers (router biases), whole; the first copy of a stage owns them."""
    if owned and mesh.dense is not None and mesh.dense.rank() != 0:
        return
    for stage in stages.values():
        parameters = {name for name, _ in stage.named_parameters(remove_duplicate=False)}
        for name, tensor, local in named_tensors(stage):
            if local not in parameters:
                yield whole(name, tensor)


def module_fragments(stage: nn.Module, prefix: str = "") -> Iterator[Fragment]:
    """All weights (under `prefix`) and buffers of a module, whole: for one process that only wants to compute."""
    parameters = {name for name, _ in stage.named_parameters(remove_duplicate=False)}
    for name, tensor, local in named_tensors(stage):
        yield whole((prefix if local in parameters else "") + name, tensor)


def whole(name: str, tensor: Tensor) -> Fragment:
    """A tensor that lives here entirely. Raises ValueError if it is not contiguous: loading must reach it."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous and cannot be loaded in place")
    return Fragment(name, tuple(tensor.shape), 0, tensor.detach().view(-1))


# -- to and from disk ----------------------------------------------------------------------------------------------


def save_fragments(path: Path, fragments: Sequence[Fragment], group: dist.ProcessGroup | None) -> None:
    """Write this rank's fragments; collective. Raises RuntimeError if an element would be written twice or never."""
    with _plain_errors():
        dcp.save({"fragments": list(fragments)}, checkpoint_id=path, planner=_Saving(), process_group=group,
                 no_dist=group is None)  # fmt: skip


def load_fragments(path: Path, fragments: Sequence[Fragment], group: dist.ProcessGroup | None) -> None:
    """Fill this rank's fragments; collective over `group`. Raises RuntimeError, with the name, if one does not fit
    what was saved. Types are converted."""
    with _plain_errors():
        dcp.load({"fragments": list(fragments)}, checkpoint_id=path, planner=_Loading(), process_group=group,
                 no_dist=group is None)  # fmt: skip


@contextmanager
def _plain_errors() -> Iterator[None]:
    """DCP wraps the errors of all ranks with their tracebacks; raise the first one itself, on every rank."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch.distributed is disabled.*")  # one process is meant
        try:
            yield
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
            raise RuntimeError(f"on rank {rank}: {cause}") from error


@dataclass(frozen=True)
class SavedTensor:
    """What a checkpoint knows about a tensor: shape, type, and into how many chunks it was cut."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: int


def saved_tensors(path: Path) -> dict[str, SavedTensor]:
    """Everything in a checkpoint, by name, without reading the values."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    return {
        name: SavedTensor(tuple(metadata.planner_data[name]), stored.properties.dtype, len(stored.chunks))
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


class _Saving(SavePlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self.fragments: dict[tuple[str, int], Fragment] = {f.key: f for f in state_dict["fragments"]}

    def create_local_plan(self) -> SavePlan:
        items = []
        for f in self.fragments.values():
            data = TensorWriteData(f.chunk, TensorProperties(dtype=f.values.dtype), torch.Size([f.numel]))
            items.append(WriteItem(MetadataIndex(f.name, torch.Size([f.start])), WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items, planner_data={f.name: f.shape for f in self.fragments.values()})

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for name, stored in metadata.state_dict_metadata.items():
            _check_tiling(name, stored)
        shapes = {name: shape for plan in all_plans for name, shape in plan.planner_data.items()}
        return plans, dataclasses.replace(metadata, planner_data=shapes)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        index = write_item.index
        return self.fragments[index.fqn, index.offset[0] if index.offset else 0].values


def _check_tiling(name: str, stored: Any) -> None:
    """Every element once: chunks follow each other from the first element to the last."""
    position = 0
    for chunk in sorted(stored.chunks, key=lambda c: c.offsets[0]):
        if chunk.offsets[0] != position:
            what = "twice" if chunk.offsets[0] < position else "never"
            raise ValueError(f"{name}: elements from {min(position, chunk.offsets[0])} would be saved {what}")
        position += chunk.sizes[0]
    if position != stored.size[0]:
        raise ValueError(f"{name}: elements from {position} to {stored.size[0]} would be saved never")


class _Loading(LoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self.metadata = metadata
        self.fragments: dict[tuple[str, int], Fragment] = {f.key: f for f in state_dict["fragments"]}

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for fragment in self.fragments.values():
            stored = self.metadata.state_dict_metadata.get(fragment.name)
            if not isinstance(stored, TensorStorageMetadata):
                raise ValueError(f"{fragment.name} is not in the checkpoint")
            saved_shape = tuple(self.metadata.planner_data[fragment.name])
            if saved_shape != fragment.shape:
                raise ValueError(f"{fragment.name} was saved with shape {saved_shape}; needed is {fragment.shape}")
            items += create_read_items_for_chunk_list(fragment.name, stored, [fragment.chunk])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        values = self.fragments[index.fqn, index.offset[0] if index.offset else 0].values
        return values.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The values were copied into place."""
