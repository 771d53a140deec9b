"""The queue of deferred weight gradients: how a backward is split into I and W.

A linear layer's backward computes two products. The gradient of its input is awaited by the previous layer; the
gradient of its weight by nobody before the optimizer step. So every layer hands the second one over as a closure:

    queue.put(lambda: weight.main_grad.addmm_(dy.T, x))

Outside a recording the closure runs at once, and the layer behaves as under ordinary autograd. While a chunk
records under a key (stage, micro-batch, segment), its closures are kept, and run when the schedule says W.

torch's own way to split a backward walks the autograd graph twice, and then runs custom functions and recomputed
blocks a second time in W; an explicit queue never computes anything twice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

Closure = Callable[[], None]


class WeightGradQueue:
    """Closures by key, in the order in which they were put. One per pipeline; no global state."""

    def __init__(self) -> None:
        self._closures: dict[Hashable, list[Closure]] = {}
        self._recording: list[Closure] | None = None

    def record(self, key: Hashable) -> Recording:
        """Keep what is put inside the `with` block under `key`, which must be free."""
        return Recording(self, key)

    def put(self, closure: Closure) -> None:
        """Keep the closure under the key that records, or run it now if none does."""
        if self._recording is None:
            closure()
        else:
            self._recording.append(closure)

    def run(self, key: Hashable) -> None:
        """Run and forget the closures of a key, in order. A key without closures is no error."""
        for closure in self._closures.pop(key, ()):
            closure()

    def clear(self) -> None:
        """Forget everything: after a failed step."""
        self._closures.clear()
        self._recording = None

    def __len__(self) -> int:
        return len(self._closures)


class Recording:
    """The `with` block of `WeightGradQueue.record`. If it raises, what was put inside is forgotten."""

    __slots__ = ("_key", "_outer", "_queue")

    def __init__(self, queue: WeightGradQueue, key: Hashable) -> None:
        self._queue, self._key = queue, key
        self._outer: list[Closure] | None = None

    def __enter__(self) -> None:
        queue = self._queue
        if self._key in queue._closures:
            raise RuntimeError(f"weight gradients of {self._key} are already waiting; they must run before new ones")
        self._outer, queue._recording = queue._recording, []

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        queue = self._queue
        if kind is None and queue._recording:
            queue._closures[self._key] = queue._recording
        queue._recording = self._outer
