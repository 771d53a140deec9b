"""Ending a run early and in order: on a signal, or because the run's folder can no longer be written.

A rank never leaves alone, for its peers would hang. It asks; after each step all ranks compare what was asked, and all
leave after the same step. A signal (SIGTERM, SIGUSR1, SIGINT) asks for a checkpoint and exit code 0, a disk that is
full for exit code 1 and what has been saved so far.
"""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

from parallel.mesh import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_CTRL_C = 1.0  # seconds within which a second SIGINT is the first one again
_NO, _LEAVE, _FAIL = range(3)


@dataclass(frozen=True)
class Stop:
    """What the ranks agreed on. `failed`: the run cannot go on, and cannot save either."""

    reason: str
    failed: bool


class RunStopped(Exception):
    """The run ended before its last step, as all ranks agreed; what was to be saved is saved."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.reason)
        self.stop = stop


class StopRequest:
    """What this rank asks for; the first reason of the most serious kind stays."""

    def __init__(self) -> None:
        self._asked = (_NO, "")  # one value, as a signal may come in between any two

    def leave(self, reason: str) -> None:
        """Ask for a checkpoint and the end. Safe in a signal handler."""
        self._ask(_LEAVE, reason)

    def fail(self, reason: str) -> None:
        """Ask for the end without another checkpoint."""
        self._ask(_FAIL, reason)

    def _ask(self, wish: int, reason: str) -> None:
        if wish > self._asked[0]:
            self._asked = (wish, reason)

    def agreed(self, mesh: Mesh) -> Stop | None:
        """What is to be done if any rank has asked, the same on all; collective."""
        mine = self._asked
        worst = torch.tensor(mine[0])
        if mesh.control is not None:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=mesh.control)
        if not worst:
            return None
        asked: list[tuple[int, str]] = [mine] * mesh.layout.world
        if mesh.control is not None:
            dist.all_gather_object(asked, mine, group=mesh.control)
        rank = next(rank for rank, (wish, _) in enumerate(asked) if wish == int(worst))
        return Stop(f"rank {rank}: {asked[rank][1]}", failed=int(worst) == _FAIL)


def stop_on_signals(request: StopRequest) -> None:
    """From now on the first signal asks for a stop, and a second Ctrl-C ends this process at once.

    In a terminal one Ctrl-C comes twice, from the terminal and from torchrun, which passes on what it gets.
    """
    first = math.inf

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            if time.monotonic() > first + SAME_CTRL_C:
                os._exit(128 + number)
            first = min(first, time.monotonic())
        request.leave(f"received {name}")

    for number in SIGNALS:
        signal.signal(number, handle)


def ignore_signals() -> None:
    """From now on signals do nothing: the run is leaving. (Python gives its handlers up before a process ends.)"""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
