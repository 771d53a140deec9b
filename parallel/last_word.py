"""Who speaks when all ranks of a torchrun have the same complaint: rank 0, and it must live long enough to do so.

The first process that ends with an error makes torchrun end all others of its node. What is wrong with the arguments
every rank finds at about the same moment, and if rank 0 is the last one it is gone before it has said so. So the
others, who have nothing to say, wait until they are ended.
"""

from __future__ import annotations

import os
import signal
import time

PATIENCE = 60.0  # seconds; only as long as rank 0 takes to import what the others have imported


def leave_last_word_to_rank_0() -> None:
    """Before ending with an error that rank 0 has as well. Does not return where torchrun ends this process first.

    Only ranks beside rank 0 wait, or beside the first rank of another node: whether torchrun runs, and where, its own
    environment variables say.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run's own way to stop would not end this
        time.sleep(PATIENCE)
