"""Signs of life: how a process that is frozen or cut off is noticed, although its connections do not close.

Everybody gives a sign BEATS times in so many seconds, beside the thread that computes: a long step is no silence. Who
listens counts its own beats since the latest sign, not seconds, so nobody is lost when a whole machine was suspended.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

BEATS = 4
VARIABLE = "SERVING_PULSE"  # the number of the file through which a supervisor hears the signs of its child


class Quiet:
    """How long nobody was heard of, in beats of one's own."""

    def __init__(self) -> None:
        self._beats = 0

    def heard(self) -> None:
        self._beats = 0

    def beat(self) -> bool:
        """To be called BEATS times in the time of silence that is allowed; True when that is over."""
        self._beats += 1
        return self._beats > BEATS


def every_beat(silence: float, work: Callable[[], bool]) -> None:
    """Call `work` BEATS times in `silence` seconds, in a thread of its own, until it returns False."""

    def run() -> None:
        while work():
            time.sleep(silence / BEATS)

    threading.Thread(target=run, name="pulse", daemon=True).start()


def give_signs(silence: float) -> None:
    """From now on the supervisor that has started this process, if one has, hears from it."""
    number = os.environ.get(VARIABLE)
    if number is None:
        return

    def sign() -> bool:
        try:
            os.write(int(number), b".")
        except OSError:  # the supervisor is gone, and with it soon this process
            return False
        return True

    every_beat(silence, sign)
