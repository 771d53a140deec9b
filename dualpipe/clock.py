"""Marks in time on the device that computes, without waiting for it.

On a CPU a mark is the host's clock. On a GPU it is an event in the current stream, and the time between two of them is
asked for after the step, when the device has passed both. So measuring costs no synchronisation in the step.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    def mark(self) -> Any:
        """This moment, as the device will reach it."""
        ...

    def seconds(self, first: Any, second: Any) -> float:
        """The time from one mark to a later one."""
        ...


class HostClock:
    mark = staticmethod(time.perf_counter)

    def seconds(self, first: float, second: float) -> float:
        return second - first


class DeviceClock:
    """Events of an accelerator's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, second: Any) -> float:
        second.synchronize()
        return float(first.elapsed_time(second)) / 1e3


def clock_of(device: torch.device) -> Clock:
    return HostClock() if device.type == "cpu" else DeviceClock(device)
