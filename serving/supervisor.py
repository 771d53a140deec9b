"""Starts an engine process and starts it again when it dies. torchrun would end every rank when one dies, so its ranks
are these: they hold no model, and nothing that can crash with one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from serving.pulse import BEATS, VARIABLE, Quiet

CANNOT = 2  # the exit code of an engine process for what a restart cannot mend
TRIES = 3  # deaths in a row, each soon after its start, before we give up
SOON = 60.0  # seconds
PAUSE = 0.5  # seconds before a restart
LOOK = 0.1  # seconds from one look at the child to the next


class Supervisor:
    """name: what to call it in messages. `stop` may be called from anywhere, signal handlers included.

    silence   seconds without a sign of life (pulse.py), after a first one, at which a child is ended as if it had died
    """

    def __init__(self, name: str, words: Sequence[str], silence: float) -> None:
        self.name, self._silence = name, silence
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
        signs, childs_end = os.pipe()
        os.set_blocking(signs, False)
        with subprocess.Popen(self._command, stdin=subprocess.PIPE, start_new_session=True, pass_fds=(childs_end,),
                              env={**os.environ, VARIABLE: str(childs_end)}) as child:  # fmt: skip
            os.close(childs_end)
            try:
                return self._watch(child, signs)
            finally:
                os.close(signs)

    def _watch(self, child: subprocess.Popen[bytes], signs: int) -> int:
        """Wait for the child's end, or bring it about. Looks are counted, not seconds: see pulse.py."""
        quiet, begun, looks = Quiet(), False, 0
        while not self._stopping.is_set():
            try:
                return child.wait(timeout=LOOK)
            except subprocess.TimeoutExpired:
                looks += 1
            if _has_signed(signs):
                quiet.heard()
                begun, looks = True, 0
            elif begun and looks * LOOK >= self._silence / BEATS:
                looks = 0
                if quiet.beat():
                    print(
                        f"the {self.name} has given no sign of life for {self._silence:g} s",
                        file=sys.stderr,
                        flush=True,
                    )
                    break
        child.kill()
        return child.wait()


def _has_signed(signs: int) -> bool:
    try:
        return bool(os.read(signs, 1 << 16))
    except BlockingIOError:
        return False
