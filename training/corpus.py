"""From text files to two memory-mapped token files: one to train on, one to validate on.

A byte is a token, so nothing has to be downloaded and any text can be read; the token `EOD` follows each document.
A document is a file. With no path given, the corpus is the source and documentation text of the running Python's
own standard library: some twelve megabytes of English and code that every machine has.

Split. A file belongs to validation when a hash of its relative path falls below `val_fraction`, so a file never
changes sides when others come or go. When there are so few files that this fraction is less than one of them, every
file is cut instead: its head is a document of the training split, its tail one of the validation split.

Cache. A corpus is built once into `cache_dir/<key>/`, where the key is a hash of the source, of the list of its
files with their sizes and times of change, and of the settings. It is built aside and renamed when whole, under a
file lock, so any number of processes may ask at once, before there is a process group: the first builds, the others
find. A folder holds `train.bin` and `val.bin` (little-endian uint16) and `manifest.json` (what is in them).
"""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from model.tokenizer import EOD, ByteTokenizer

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")

FORMAT = 1  # change it when the same files would give other token files
_TOKEN = np.dtype("<u2")
_BLOCK = 1 << 22  # bytes read at a time: a file may be larger than memory
_STDLIB_SUFFIXES = (".py", ".txt", ".rst")
_STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Document:
    """Bytes [start, start + size) of a file, which are one document of one split."""

    path: str
    start: int
    size: int
    split: Split
    sha256: str = ""


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk. `digest` identifies its content: equal digests mean equal tokens, whatever the paths."""

    folder: Path
    source: str
    digest: str
    num_files: int
    train_tokens: int
    val_tokens: int
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)

    def tokens(self, split: Split) -> np.ndarray:
        """The token stream of a split, memory-mapped read-only: uint16, documents end to end, each with its EOD."""
        return np.memmap(self.folder / f"{split}.bin", dtype=_TOKEN, mode="r")


def prepare_corpus(path: str | None, cache_dir: Path, val_fraction: float, exclude: Sequence[Path] = ()) -> Corpus:
    """Find or build the token files of the text at `path` (a folder or a file; None: the standard library).

    In a folder every file is taken that is UTF-8 without NUL bytes, except hidden ones, `__pycache__`, the cache
    itself and the folders in `exclude` (a run directory changes during training and would change the corpus).
    Any number of processes may call this at once. Raises ValueError when there is nothing to train on.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"data.val_fraction={val_fraction} must lie between 0 and 1; try data.val_fraction=0.05")
    files = _find_files(path, {p.resolve() for p in (cache_dir, *exclude)})
    if not files:
        raise ValueError(f"data.path={path} has no files; point data.path at a folder of text, or at one file")
    source = _root(path)
    stats = [(name, (stat := file.stat()).st_size, stat.st_mtime_ns) for name, file in files.items()]
    folder = cache_dir / _sha256(json.dumps([FORMAT, str(source), val_fraction, stats]).encode())[:16]
    if not folder.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with (cache_dir / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                _build(files, source, val_fraction, building=cache_dir / "building", folder=folder)
    return _open(folder)


def _root(path: str | None) -> Path:
    return Path(sysconfig.get_path("stdlib") if path is None else path).expanduser().resolve()


def _find_files(path: str | None, excluded: set[Path]) -> dict[str, Path]:
    """Candidate files by their path relative to the source, sorted by it."""
    root = _root(path)
    if not root.exists():
        raise ValueError(f"data.path={path} does not exist; give a folder of text files, or leave data.path out")
    if root.is_file():
        return {root.name: root}
    found = {}
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = [f for f in folders if _takes_folder(here / f, path is None) and here / f not in excluded]
        for file in (here / name for name in names):
            if not file.name.startswith(".") and file.is_file() and (path or file.suffix in _STDLIB_SUFFIXES):
                found[file.relative_to(root).as_posix()] = file
    return dict(sorted(found.items()))


def _takes_folder(folder: Path, is_stdlib: bool) -> bool:
    if folder.name.startswith(".") or folder.name == "__pycache__":
        return False
    return not (is_stdlib and folder.name in _STDLIB_SKIPPED)


def _open(folder: Path) -> Corpus:
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in SPLITS:
        expected = manifest[f"{split}_tokens"] * _TOKEN.itemsize
        found = (folder / f"{split}.bin").stat().st_size
        if found != expected:
            raise ValueError(f"{folder / split}.bin has {found} bytes, not {expected}; delete {folder} to rebuild it")
    keys = ("source", "digest", "num_files", "train_tokens", "val_tokens")
    return Corpus(folder, **{key: manifest[key] for key in keys})


def _build(files: dict[str, Path], source: Path, val_fraction: float, building: Path, folder: Path) -> None:
    """Write the token files and the manifest. The caller holds the lock, so what is in `building` was abandoned."""
    texts = {name: file for name, file in files.items() if _is_text(file)}
    plan = _plan(texts, val_fraction)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "source": str(source),
        "tokenizer": {"kind": "bytes", **asdict(ByteTokenizer())},
        "val_fraction": val_fraction,
        "num_files": len(texts),
    }
    content = hashlib.sha256()
    for split in SPLITS:
        documents = [document for document in plan if document.split == split]
        if not documents:
            raise ValueError(
                f"data.path={source} has {len(texts)} text files (UTF-8, not empty), too little to fill the {split} "
                f"split; give more text, or another share than data.val_fraction={val_fraction}"
            )
        content.update(split.encode())
        with (building / f"{split}.bin").open("wb") as out:
            manifest[f"{split}_files"] = [asdict(_write(d, texts[d.path], out, content)) for d in documents]
            manifest[f"{split}_tokens"] = out.tell() // _TOKEN.itemsize
    manifest["digest"] = content.hexdigest()
    manifest["skipped"] = [name for name in files if name not in texts]
    (building / "manifest.json").write_text(json.dumps(manifest, indent=1))
    building.rename(folder)


def _is_text(file: Path) -> bool:
    """Whether a file can be read, is not empty, and is UTF-8 without NUL bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with file.open("rb") as handle:
            while block := handle.read(_BLOCK):
                if b"\0" in block:
                    return False
                decoder.decode(block)
            decoder.decode(b"", final=True)
            return handle.tell() > 0
    except (OSError, UnicodeDecodeError):
        return False


def _plan(texts: dict[str, Path], val_fraction: float) -> list[Document]:
    """Which documents there will be, and in which split."""
    if len(texts) * val_fraction < 1:
        return [document for name, file in texts.items() for document in _cut(name, file, val_fraction)]
    share = {name: int(_sha256(os.fsencode(name))[:16], 16) / 2**64 for name in texts}
    val = {name for name in texts if share[name] < val_fraction} or {min(texts, key=share.__getitem__)}
    if len(val) == len(texts):
        val.remove(max(texts, key=share.__getitem__))
    return [Document(n, 0, f.stat().st_size, "val" if n in val else "train") for n, f in texts.items()]


def _cut(name: str, file: Path, val_fraction: float) -> Iterator[Document]:
    """A file's head for training and its tail for validation, cut after a line if one ends soon, else a character."""
    size = file.stat().st_size
    cut = int(size * (1 - val_fraction))
    with file.open("rb") as handle:
        handle.seek(cut)
        near = handle.read(1 << 12)
    line = near.find(b"\n") + 1
    if line and cut + line < size:
        cut += line
    else:
        cut += next((i for i, byte in enumerate(near) if byte & 0xC0 != 0x80), 0)
    if cut > 0:
        yield Document(name, 0, cut, "train")
    if cut < size:
        yield Document(name, cut, size - cut, "val")


def _write(document: Document, file: Path, out: BinaryIO, content: hashlib._Hash) -> Document:
    """Append a document's tokens and its EOD to a token file and to the content hash; give it back with its hash."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        handle.seek(document.start)
        left = document.size
        while block := handle.read(min(_BLOCK, left)):
            left -= len(block)
            digest.update(block)
            out.write(np.frombuffer(block, np.uint8).astype(_TOKEN).tobytes())
    if left:
        raise ValueError(f"{file} became {left} bytes shorter while it was read; start again when it is at rest")
    out.write(np.array([EOD], _TOKEN).tobytes())
    content.update(digest.digest())
    return replace(document, sha256=digest.hexdigest())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
