"""Can a run keep its results in its folder? Asked before anything is started."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_writable(run_dir: Path) -> None:
    """Make the folder and write into it. Raises ValueError, naming the override, where that is not possible."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise ValueError(
            f"{run_dir} cannot be written ({error.strerror}): make room there, or choose another folder with runs_dir=…"
        ) from error
