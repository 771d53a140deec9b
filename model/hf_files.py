"""Reads and writes checkpoints in the public format: shards of safetensors, an index, config.json.

Streaming: a reader holds one tensor, a writer those of half a shard, so memory does not grow with the model. The
format is simple enough to be written a tensor at a time: the header's length (8 bytes), the header as JSON, the bytes.
(The library's own writer wants all tensors of a file at once, and copies them.)

The FP8 variant stores the matrices of linear layers as float8_e4m3fn, each beside its `weight_scale_inv`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from model.config import ModelConfig
from model.fp8.quantize import TILE, Quantized, quantize_blocks, scale_shape
from model.hf import Entry, entries, from_hf_config, to_hf_config

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
SCALE = "_scale_inv"
_DTYPES = {
    "bf16": (torch.bfloat16, "bfloat16"),
    "fp32": (torch.float32, "float32"),
    "fp8": (torch.bfloat16, "float8_e4m3fn"),
}
_CODES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}

Source = Callable[[Sequence[str]], Mapping[str, Tensor]]


class FormatError(ValueError):
    """A checkpoint is not what the model needs; the message names the tensors."""


# -- reading -----------------------------------------------------------------------------------------------------------


def from_blocks(values: Tensor, scale_inv: Tensor) -> Tensor:
    """A matrix that is stored in FP8 blocks of 128 × 128, in FP32. Raises ValueError for scales of another shape."""
    weight = Quantized(values, scale_inv.float(), TILE).dequantize()
    return weight.masked_fill_(values.view(torch.uint8) & 0x7F == 0x7F, float("nan"))  # a damaged file's NaN stays one


class PublicCheckpoint:
    """A checkpoint folder, opened for reading. Raises FormatError if files are missing or unreadable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = from_hf_config(self._json(CONFIG))
        if (folder / INDEX).is_file():
            self.files: dict[str, str] = self._json(INDEX)["weight_map"]
        elif (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, "pt") as file:
                self.files = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise FormatError(f"{folder} has neither {INDEX} nor {SINGLE}")
        lost = sorted({name for name in self.files.values() if not (folder / name).is_file()})
        if lost:
            raise FormatError(f"{folder}: the index names files that are not there: {', '.join(lost)}")

    def check(self, config: ModelConfig) -> None:
        """Raise FormatError unless it holds exactly this model's tensors; missing, extra, misshapen ones are named."""
        wanted = {entry.name: entry for entry in entries(config)}
        missing = [e.name for e in wanted.values() if e.name not in self.files and not e.is_copy]
        known = wanted.keys() | {name + SCALE for name, e in wanted.items() if e.is_linear}
        extra = [name for name in self.files if name not in known]
        shapes = [
            f"{name} is {shape}, expected {wanted[name].shape}"
            for name, shape in self._shapes()
            if name in wanted and shape != wanted[name].shape
        ]
        found = [("missing", missing), ("not part of the model", extra), ("of the wrong shape", shapes)]
        problems = [f"{what}: {_listed(names)}" for what, names in found if names]
        if problems:
            raise FormatError(f"{self.folder} does not fit the model. " + ". ".join(problems))

    def load_into(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        """Fill our tensors (by global name, e.g. those of one rank), one after the other; others are not read."""
        self.check(config)
        mine = [e for e in entries(config) if e.ours in tensors and not e.is_copy]
        with torch.no_grad():
            for entry, value in self.read(mine):
                tensors[entry.ours][entry.rows].copy_(value)

    def read(self, wanted: Sequence[Entry]) -> Iterator[tuple[Entry, Tensor]]:
        """The values of entries, in FP32 if they were quantised; file by file, each opened once."""
        by_file: dict[str, list[Entry]] = {}
        for entry in wanted:
            by_file.setdefault(self.files[entry.name], []).append(entry)
        for name, group in by_file.items():
            with safe_open(self.folder / name, "pt") as file:
                for entry in group:
                    value = file.get_tensor(entry.name)
                    yield entry, value if value.element_size() > 1 else self._dequantised(entry, value)

    def _dequantised(self, entry: Entry, value: Tensor) -> Tensor:
        scale = entry.name + SCALE
        if scale not in self.files:
            raise FormatError(f"{self.folder}: {entry.name} is quantised, but {scale} is missing")
        with safe_open(self.folder / self.files[scale], "pt") as file:
            return from_blocks(value, file.get_tensor(scale))

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name in sorted(set(self.files.values())):
            with safe_open(self.folder / name, "pt") as file:
                held = set(file.keys())
                indexed = {tensor for tensor, where in self.files.items() if where == name}
                if indexed - held:
                    raise FormatError(f"{self.folder / name} lacks {_listed(sorted(indexed - held))}")
                for tensor in indexed:
                    yield tensor, tuple(file.get_slice(tensor).get_shape())

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError) as error:
            raise FormatError(f"{self.folder / name} cannot be read: {error}") from error


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


# -- writing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """A tensor in a shard: of an entry, or the scales of one."""

    name: str
    entry: Entry
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_checkpoint(
    folder: Path, config: ModelConfig, source: Source, variant: str = "bf16", max_length: int = 4096,
    shard_bytes: int = 5_000_000_000,
) -> list[Path]:  # fmt: skip
    """Write the model to an empty or new folder; returns the shards.

    source      gives our tensors by global name; asked for as many as half a shard's bytes hold in FP32, so that the
                peak stays below twice the largest shard whatever the variant
    variant     bf16, fp32, or fp8 (matrices of linear layers in FP8 blocks, the rest in BF16)
    max_length  positions that the model was trained with, for config.json

    Router biases are FP32 in every variant. Raises ValueError for a folder with files in it, an unknown variant, or a
    model that the format cannot express.
    """
    if variant not in _DTYPES:
        raise ValueError(f"format {variant!r} is unknown; choose one of {', '.join(_DTYPES)}")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder")
    settings = to_hf_config(config, _DTYPES[variant][1], max_length)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(config, variant, shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, slots in zip(names, shards, strict=True):
        _write_shard(folder / name, slots, source)
    total = sum(slot.size for slots in shards for slot in slots)
    where = {slot.name: name for name, slots in zip(names, shards, strict=True) for slot in slots}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    (folder / CONFIG).write_text(json.dumps(settings, indent=2))
    return [folder / name for name in names]


def _shards(config: ModelConfig, variant: str, shard_bytes: int) -> list[list[_Slot]]:
    """Tensors in order, into files of at most `shard_bytes` (a larger tensor has its own)."""
    shards: list[list[_Slot]] = [[]]
    filled = 0
    for entry in entries(config):
        slots = list(_slots(entry, variant))
        size = sum(slot.size for slot in slots)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += slots
        filled += size
    return shards


def _slots(entry: Entry, variant: str) -> Iterator[_Slot]:
    if variant == "fp8" and entry.is_linear:
        yield _Slot(entry.name, entry, torch.float8_e4m3fn, entry.shape)
        yield _Slot(entry.name + SCALE, entry, torch.float32, scale_shape(entry.shape, TILE))
    else:
        dtype = torch.float32 if entry.ours.endswith("router.bias_E") else _DTYPES[variant][0]
        yield _Slot(entry.name, entry, dtype, entry.shape)


def _write_shard(path: Path, slots: Sequence[_Slot], source: Source) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for slot in slots:
        header[slot.name] = {
            "dtype": _CODES[slot.dtype], "shape": list(slot.shape), "data_offsets": [offset, offset + slot.size]
        }  # fmt: skip
        offset += slot.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in _parts(slots, offset // 2):
            _write_part(file, part, source(sorted({slot.entry.ours for slot in part})))


def _write_part(file: BinaryIO, slots: Sequence[_Slot], tensors: Mapping[str, Tensor]) -> None:
    scale: Tensor | None = None
    for slot in slots:
        value = tensors[slot.entry.ours].detach()[slot.entry.rows]
        if slot.dtype == torch.float8_e4m3fn:
            blocks = quantize_blocks(value)
            value, scale = blocks.values, blocks.scales
        elif scale is not None:  # a matrix's scales follow it
            value, scale = scale, None
        file.write(value.to(device="cpu", dtype=slot.dtype).contiguous().view(torch.uint8).numpy().data)


def _parts(slots: Sequence[_Slot], limit: int) -> Iterator[list[_Slot]]:
    """The slots in stretches whose tensors take at most `limit` bytes in FP32, or of one tensor."""
    part: list[_Slot] = []
    held = 0
    for _, group in groupby(slots, key=lambda slot: slot.entry.ours):
        same = list(group)
        size = 4 * sum(prod(slot.shape) for slot in same if not slot.name.endswith(SCALE))
        if part and held + size > limit:
            yield part
            part, held = [], 0
        part += same
        held += size
    yield part
