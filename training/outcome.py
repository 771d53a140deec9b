"""How a run ended, for whoever started it: an exit code, or a word to launch/torchrun.sh.

torchrun starts ranks again that end with an error, which is right for a crash and wrong for an ending on purpose: the
configuration is as bad the second time, and a full disk as full. So launch/torchrun.sh names a file in OUTCOME_FILE;
the ranks write there what they mean and end with 0, and the script turns it into its own exit code. Without that
file (plain torchrun) they end with the code itself.
"""

from __future__ import annotations

import os
from pathlib import Path

from parallel.last_word import leave_last_word_to_rank_0

BAD_CONFIG, FAILED, DONE = 2, 1, 0
STOPPED = "stopped"  # ended early and in order; the same command goes on


def launched_by_script() -> bool:
    return bool(os.environ.get("OUTCOME_FILE"))


def end_on_purpose(code: int, word: str | None = None) -> int:
    """Report this ending, on which all ranks agree; returns the exit code of this process."""
    path = os.environ.get("OUTCOME_FILE")
    if not path:
        if code:
            leave_last_word_to_rank_0()
        return code
    Path(path).write_text(f"{word or code}\n")
    return DONE
