"""Is a checkpoint whole and undamaged? Checksums of its files, and a marker that is written last.

    checksums.json   {file: {bytes, sha256}} of every other file
    COMPLETE         sha256 of checksums.json

A folder without the marker was never finished. Sizes are compared when a run looks for its checkpoint; the contents
when it loads one, each rank reading its part of the files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

COMPLETE, CHECKSUMS = "COMPLETE", "checksums.json"

Entry = dict[str, int | str]


def digest(path: Path) -> Entry:
    """Size and checksum of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def seal(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Write the checksums and then the marker, each safely on disk before the next step."""
    (folder / CHECKSUMS).write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")
    flush(folder / CHECKSUMS)
    (folder / COMPLETE).write_text(str(digest(folder / CHECKSUMS)["sha256"]) + "\n")
    flush(folder / COMPLETE)
    flush(folder)


def read_checksums(folder: Path) -> dict[str, Entry]:
    """The table of files. Raises ValueError, saying why, if the folder was not finished or a file is missing or short.

    Cheap: reads no contents.
    """
    try:
        marker = (folder / COMPLETE).read_text().strip()
    except OSError:
        raise ValueError(f"it has no {COMPLETE} marker: saving it was never finished") from None
    try:
        if digest(folder / CHECKSUMS)["sha256"] != marker:
            raise ValueError(f"{CHECKSUMS} is not the one that {COMPLETE} was written for")
        entries: dict[str, Entry] = json.loads((folder / CHECKSUMS).read_text())
    except OSError as error:
        raise ValueError(f"{CHECKSUMS} cannot be read: {error}") from None
    for name, entry in entries.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            have = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{name} {have}; it was saved with {entry['bytes']} bytes")
    return entries


def check_contents(folder: Path, entries: Mapping[str, Entry], names: Iterable[str]) -> None:
    """Read these files whole. Raises ValueError for one whose contents have changed."""
    for name in names:
        if digest(folder / name)["sha256"] != entries[name]["sha256"]:
            raise ValueError(f"{name} does not have the contents that were saved (its checksum differs)")


def flush(path: Path) -> None:
    """Make sure that a file, or a folder's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
