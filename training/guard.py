"""When a step goes wrong: skip it, count it, and give up, or go back, when it keeps going wrong.

A gradient that is not finite would turn every weight into NaN, and one outlier batch can throw a run back by days. So
a step whose gradient norm is not finite, or (if asked) far above what was usual lately, leaves the weights as they are.
One such step is bad luck. After `max_skipped` in a row the run stops, saying which layer the first bad number came
from; with `rewind` it goes back to its newest checkpoint and on with other data instead, as the report's authors did
not have to (4.1: no rollbacks) but most do.

Every rank sees the same norm, so all come to the same verdict without asking each other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class GuardConfig:
    max_skipped: int = 5  # steps in a row; then the run stops, or rewinds
    spike: float = 0.0  # skip a step whose gradient norm exceeds this multiple of the recent median; 0 = never
    window: int = 64  # how many steps are recent
    rewind: bool = False  # go back to the newest checkpoint, and on with the data after the bad ones
    max_rewinds: int = 3

    def check(self) -> None:
        """Raise ValueError, naming the override, for values that cannot be meant."""
        for name in ("max_skipped", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"guard.{name}={getattr(self, name)} must be at least 1")
        if self.max_rewinds < 0:
            raise ValueError(f"guard.max_rewinds={self.max_rewinds} must be 0 or more")
        if not (self.spike == 0 or 1 < self.spike < math.inf):
            raise ValueError(f"guard.spike={self.spike} must be 0 (off) or more than 1")


class Diverged(RuntimeError):
    """Too many steps in a row had to be skipped; the message names the layer."""


class Guard:
    """Keeps the norms of recent good steps, and counts the bad ones."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._recent: list[float] = []
        self.in_a_row = self.rewinds = 0

    @property
    def recent(self) -> list[float]:
        """What a checkpoint has to keep, for a resumed run to judge alike."""
        return list(self._recent)

    def restore(self, recent: Sequence[float]) -> None:
        self._recent = list(recent)

    @property
    def limit(self) -> float:
        """The largest norm with which the next step may be taken; infinite until there are `window` good ones."""
        if not self._config.spike or len(self._recent) < self._config.window:
            return math.inf
        return self._config.spike * statistics.median(self._recent)

    def note(self, norm: float, skipped: bool) -> bool:
        """A step is over. Returns whether it is time to stop."""
        if skipped:
            self.in_a_row += 1
            return self.in_a_row >= self._config.max_skipped
        self.in_a_row = 0
        self._recent = [*self._recent, norm][-self._config.window :]
        return False

    def may_rewind(self) -> bool:
        """Whether to go back rather than to stop; counts it."""
        if not self._config.rewind or self.rewinds >= self._config.max_rewinds:
            return False
        self.rewinds += 1
        self.in_a_row = 0
        return True
