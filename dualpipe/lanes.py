"""The two lanes of a rank: how communication runs beside compute.

A chunk hands every communication to `Lanes.start` and waits for the result where it is read. What "beside" means is
up to the device:

    HostLanes     the operation is an asynchronous collective, and goes on by itself until it is waited for (CPU)
    StreamLanes   the operation, its packing and its unpacking run on a stream of their own (GPU)
    SerialLanes   it is waited for at once: nothing overlaps (`overlap=off`)

There is one Python thread; no lane has a queue of its own on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dualpipe.clock import Clock
from dualpipe.stage import Lane, Pending

Begin = Callable[[], Pending]
Label = str | tuple[str, str, tuple[int, int]]  # a piece for records; put into words only there (`_name`)


class Lanes(Protocol):
    def compute(self, label: Label, run: Callable[..., None], *arguments: Any) -> None:
        """Run a compute piece."""
        ...

    def start(self, label: Label, begin: Begin) -> Pending:
        """Start a communication on its lane, after the compute that has been issued so far.

        `begin` starts it and returns what is to be waited for.
        """
        ...


class _Direct:
    """Compute runs where it is called: in the current stream of the one thread."""

    def compute(self, label: Label, run: Callable[..., None], *arguments: Any) -> None:
        run(*arguments)


class HostLanes(_Direct):
    """Asynchronous collectives need no help: they run on the backend's threads."""

    def start(self, label: Label, begin: Begin) -> Pending:
        return begin()


class _Done:
    def __init__(self, results: tuple[Any, ...]) -> None:
        self._results = results

    def wait(self) -> tuple[Any, ...]:
        return self._results


class SerialLanes(_Direct):
    """No second lane: a communication is over before anything else begins."""

    def start(self, label: Label, begin: Begin) -> Pending:
        return _Done(begin().wait())


class StreamLanes(_Direct):
    """Communication on a stream of its own; events order it against the compute stream, and the host waits for none.

    communication   the stream to run on; on a CUDA device one of high priority, so that its few kernels are not
                    queued behind large products
    compute         gives the current compute stream

    A backend's `wait` (NCCL's, DeepEP's) makes the current stream wait, not the host; here that is the communication
    stream, and the compute stream waits for an event recorded behind it.
    """

    def __init__(self, communication: torch.Stream, compute: Callable[[], torch.Stream]) -> None:
        self._communication = communication
        self._compute = compute

    @staticmethod
    def on(device: torch.device) -> StreamLanes:
        return StreamLanes(
            torch.Stream(device, priority=-1),
            lambda: torch.accelerator.current_stream(device),
        )

    def start(self, label: Label, begin: Begin) -> Pending:
        self._communication.wait_event(self._compute().record_event())
        with self._communication:
            results = begin().wait()
            return _OnStream(results, self._communication.record_event(), self._compute, begin)


class _OnStream:
    """Holds `begin`, and so the tensors that are read, until the compute stream is behind the communication."""

    def __init__(
        self, results: tuple[Any, ...], done: torch.Event, compute: Callable[[], torch.Stream], begin: Begin
    ) -> None:
        self._results, self._done, self._compute, self._begin = results, done, compute, begin

    def wait(self) -> tuple[Any, ...]:
        stream = self._compute()
        stream.wait_event(self._done)
        for result in self._results:
            if isinstance(result, Tensor):
                result.record_stream(stream)  # its memory belongs to the communication stream
        return self._results


def lanes_for(device: torch.device, overlap: bool) -> Lanes:
    """The lanes of a device; with overlap off, the serial ones."""
    if not overlap:
        return SerialLanes()
    return HostLanes() if device.type == "cpu" else StreamLanes.on(device)


@dataclass(frozen=True)
class Mark:
    """One piece on a lane, between two marks of a clock. Communication ends, as seen from here, when it was waited for.

    `name` is such as `1.experts(F) of 0.3`; `waited` is when the wait began: up to there compute ran beside it.
    """

    lane: Lane
    name: str
    start: Any
    end: Any
    waited: Any = None


class RecordingLanes:
    """Lanes that note what ran when, in `marks`; for pictures (`benchmarks/overlap_trace.py`)."""

    def __init__(self, inner: Lanes, clock: Clock) -> None:
        self._inner, self._clock = inner, clock
        self.marks: list[Mark] = []

    def compute(self, label: Label, run: Callable[..., None], *arguments: Any) -> None:
        start = self._clock.mark()
        self._inner.compute(label, run, *arguments)
        self.marks.append(Mark(Lane.COMPUTE, _name(label), start, self._clock.mark()))

    def start(self, label: Label, begin: Begin) -> Pending:
        start = self._clock.mark()
        return _Recorded(self, label, start, self._inner.start(label, begin))

    def finish(self, label: Label, start: Any, pending: Pending) -> tuple[Any, ...]:
        waited = self._clock.mark()
        results = pending.wait()
        self.marks.append(Mark(Lane.COMM, _name(label), start, self._clock.mark(), waited))
        return results


def _name(label: Label) -> str:
    """A piece of a chunk is labelled with its segment, its part (F, I or W) and (stage, micro-batch)."""
    if isinstance(label, str):
        return label
    segment, part, (stage, micro_batch) = label
    return f"{segment}({part}) of {stage}.{micro_batch}"


class _Recorded:
    def __init__(self, lanes: RecordingLanes, label: Label, start: Any, pending: Pending) -> None:
        self._lanes, self._label, self._start, self._pending = lanes, label, start, pending

    def wait(self) -> tuple[Any, ...]:
        return self._lanes.finish(self._label, self._start, self._pending)
