"""Starts an engine process and starts it again when it dies. torchrun would end every rank when one dies, so its ranks
are these: they hold no model, and nothing that can crash with one.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence

CANNOT = 2  # the exit code of an engine process for what a restart cannot mend
TRIES = 3  # deaths in a row, each soon after its start, before we give up
SOON = 60.0  # seconds
PAUSE = 0.5  # seconds before a restart


class Supervisor:
    """name: what to call it in messages. `stop` may be called from anywhere, signal handlers included."""

    def __init__(self, name: str, words: Sequence[str]) -> None:
        self.name = name
        self._command = [sys.executable, "-m", "serving.engine_process", *words]
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> int:
        """Until `stop` (0), or until it is no use (the exit code that says so)."""
        quick = 0
        while True:
            started = time.monotonic()
            code = self._run_once()
            if self._stopping.is_set():
                return 0
            if code == CANNOT:
                return CANNOT
            quick = quick + 1 if time.monotonic() - started < SOON else 1
            cause = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            if quick >= TRIES:
                print(f"error: the {self.name} has ended {cause}, {quick} times in a row", file=sys.stderr, flush=True)
                return 1
            print(f"the {self.name} has ended {cause}; starting it again", file=sys.stderr, flush=True)
            self._stopping.wait(PAUSE)

    def _run_once(self) -> int:
        """The child's exit code. Its standard input stays open as long as we live; it ends with it.

        It has a session of its own, so that what torchrun or Ctrl-C sends to everybody reaches it through us only.
        """
        with subprocess.Popen(self._command, stdin=subprocess.PIPE, start_new_session=True) as child:
            while not self._stopping.is_set():
                try:
                    return child.wait(timeout=0.1)
                except subprocess.TimeoutExpired:
                    continue
            child.kill()
            return child.wait()
