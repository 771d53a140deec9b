"""Lanes: what runs beside what, on a host and on streams (stand-ins for a GPU's, which note the order of events)."""

from __future__ import annotations

from typing import Any

import torch

from dualpipe.chunk import Chunk
from dualpipe.clock import HostClock
from dualpipe.lanes import HostLanes, RecordingLanes, SerialLanes, StreamLanes, lanes_for
from dualpipe.overlap import backward_order, forward_order
from dualpipe.stage import Lane, communicate, compute
from dualpipe.wgrad import WeightGradQueue


class Op:
    """Doubles its input; notes when it is started and waited for."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def start(self, x: torch.Tensor) -> Any:
        self.log.append("start")
        log = self.log

        class Pending:
            def wait(self) -> tuple[torch.Tensor]:
                log.append("wait")
                return (2 * x,)

        return Pending()

    start_backward = start


def run(lanes: Any, log: list[str]) -> torch.Tensor:
    def first(x: torch.Tensor) -> torch.Tensor:
        log.append("first")
        return x + 1

    def second(y: torch.Tensor) -> torch.Tensor:
        log.append("second")
        return y * y

    def beside(x: torch.Tensor) -> torch.Tensor:
        log.append("beside")
        return x * 1

    segments = [
        compute("first", ("in0",), ("outer",), first),  # a name that only begins like an output
        communicate("move", ("outer",), ("b",), Op(log)),
        compute("beside", ("outer",), ("c",), beside),
        compute("second", ("b",), ("d",), second),
        compute("end", ("c", "d"), ("out0",), lambda c, d: c + d),
    ]
    chunk = Chunk((0, 0), segments, (torch.ones(1),), WeightGradQueue(), True, lanes)
    for piece in forward_order(segments):
        chunk.run(piece, lambda: log.append("send"))
    (out,) = chunk.outputs()
    chunk.seed((torch.ones(1),))
    for piece in backward_order(segments):
        chunk.run(piece, lambda: None)
    assert out.item() == 2 + 16
    (grad,) = chunk.input_grads(1)
    assert grad.item() == 1 + 2 * 2 * 4
    return grad


def test_on_a_host_compute_runs_between_start_and_wait() -> None:
    log: list[str] = []
    run(HostLanes(), log)
    assert log[:6] == ["first", "start", "beside", "wait", "second", "send"]


def test_serial_lanes_wait_at_once() -> None:
    log: list[str] = []
    run(SerialLanes(), log)
    assert log[:6] == ["first", "start", "wait", "beside", "second", "send"]


def test_overlap_off_is_serial() -> None:
    cpu = torch.device("cpu")
    assert isinstance(lanes_for(cpu, True), HostLanes)
    assert isinstance(lanes_for(cpu, False), SerialLanes)


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        self.log.append(f"{self.name} records")
        return self.name

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def __enter__(self) -> None:
        self.log.append(f"into {self.name}")

    def __exit__(self, *_: object) -> None:
        self.log.append(f"out of {self.name}")


def test_streams_order_each_other_by_events_and_all_communication_is_issued_on_its_stream() -> None:
    log: list[str] = []
    main = FakeStream("compute", log)
    lanes = StreamLanes(FakeStream("communication", log), lambda: main)  # type: ignore[arg-type, return-value]
    pending = lanes.start(("move", "F", (0, 0)), lambda: Op(log).start(torch.ones(1)))
    log.append("compute goes on")

    class Result(torch.Tensor):
        def record_stream(self, stream: Any) -> None:
            log.append(f"kept for {stream.name}")

    pending._results = (Result(),)  # type: ignore[attr-defined]
    pending.wait()
    assert log == [
        "compute records", "communication waits for compute",
        "into communication", "start", "wait", "communication records", "out of communication",
        "compute goes on", "compute waits for communication", "kept for compute",
    ]  # fmt: skip


def test_a_recording_names_every_piece_on_its_lane() -> None:
    lanes = RecordingLanes(HostLanes(), HostClock())
    run(lanes, [])
    names = [(m.lane, m.name) for m in lanes.marks]
    assert (Lane.COMM, "move(F) of 0.0") in names
    assert (Lane.COMM, "move(I) of 0.0") in names
    assert [n for lane, n in names if lane is Lane.COMPUTE][:3] == [
        "first(F) of 0.0", "beside(F) of 0.0", "second(F) of 0.0",
    ]  # fmt: skip
    assert all(m.start <= m.end for m in lanes.marks)
    (moved,) = [m for m in lanes.marks if m.name == "move(F) of 0.0"]
    beside = next(m for m in lanes.marks if m.name == "beside(F) of 0.0")
    assert moved.start <= beside.start <= beside.end <= moved.waited
