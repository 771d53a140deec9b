"""Who carries out the calls that start messages: the thread that computes, or one beside it.

Gloo writes a message in the thread that sends it, and takes a lock that its own thread may hold: a tenth of a
millisecond and more in which nothing is computed. So on a CPU a thread beside starts sends and receives, in the order
in which they are handed over, while the other one is inside its stage, where Python's lock is free. On a GPU a call
only puts a kernel into a stream, and is made at once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Protocol

import torch


class Courier(Protocol):
    """Carries out calls in order. What one of them raises is raised by whatever is asked of the courier next."""

    def hand(self, call: Callable[..., None], *arguments: Any) -> None:
        """Carry out a call, now or soon. It must not block."""
        ...

    def settle(self) -> None:
        """Wait until everything that was handed over is done."""
        ...

    def stop(self) -> None:
        """Forget what is not done yet, and end; raises nothing."""
        ...


class Direct:
    """Makes each call at once."""

    def hand(self, call: Callable[..., None], *arguments: Any) -> None:
        call(*arguments)

    def settle(self) -> None:
        pass

    def stop(self) -> None:
        pass


class _Line:
    """What the two threads share."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | threading.Event | None] = SimpleQueue()
        self.error: BaseException | None = None
        self.stopped = False


class Beside:
    """Makes the calls in a thread, which starts with the first one and ends with this object."""

    def __init__(self) -> None:
        self._line = _Line()
        self._thread: threading.Thread | None = None

    def hand(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._line.error is not None:
            raise self._line.error
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._line,), name="dualpipe messages", daemon=True)
            self._thread.start()
            weakref.finalize(self, self._line.calls.put, None)
        self._line.calls.put((call, arguments))

    def settle(self) -> None:
        if self._thread is not None:
            reached = threading.Event()
            self._line.calls.put(reached)
            reached.wait()
        if self._line.error is not None:
            raise self._line.error

    def stop(self) -> None:
        self._line.stopped = True
        if self._thread is not None:
            self._line.calls.put(None)
            self._thread.join()


def _work(line: _Line) -> None:
    """The thread. It holds on to the line alone, so that its courier can be freed while it waits."""
    while (item := line.calls.get()) is not None:
        if isinstance(item, threading.Event):
            item.set()
        elif line.error is None and not line.stopped:
            call, arguments = item
            try:
                call(*arguments)
            except BaseException as error:
                line.error = error
            del call, arguments
        del item


def courier_for(device: torch.device) -> Courier:
    return Beside() if device.type == "cpu" else Direct()
