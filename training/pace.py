"""Which rank is slow? A pipeline runs at the pace of its slowest rank, and from outside all look alike: they wait.

Every rank measures how long it computes in a step, waits for pipeline messages left out. Every few steps these times
are compared: with the rank's own best, and with the other ranks that hold the same stages. A rank that needs much
longer than both allow, while the others do not, is named if that is so twice in a row: once may be chance. (Ranks of
one expert group wait for each other inside their layers: there a slow one makes the whole group look slow.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean, median_low

import torch
import torch.distributed as dist

from parallel.mesh import Mesh

SLOW = 1.5  # times what is usual for a rank
AMONG = 1.3  # and times what the others need now over their usual: if all are slow, none is the cause


@dataclass(frozen=True)
class Pace:
    """Per rank: seconds of computing per step, and these over what is usual for it.

    suspects   ranks that were slow in the comparison before; known: those of them that have been named
    """

    seconds: tuple[float, ...]
    slowdown: tuple[float, ...]
    suspects: frozenset[int] = frozenset()
    known: frozenset[int] = frozenset()

    @property
    def slowest(self) -> int:
        return max(range(len(self.slowdown)), key=self.slowdown.__getitem__)

    @property
    def stragglers(self) -> list[int]:
        others = median_low(self.slowdown)
        return [rank for rank, ratio in enumerate(self.slowdown) if ratio > SLOW and ratio > AMONG * others]

    @property
    def news(self) -> list[str]:
        """A sentence for each rank that has become slow, and stays so."""
        return [self.describe(rank) for rank in self.stragglers if rank in self.suspects - self.known]

    def describe(self, rank: int) -> str:
        usual = self.seconds[rank] / self.slowdown[rank]
        return (
            f"rank {rank} computes {self.seconds[rank]:.3g} s per step where {usual:.3g} s are usual for it or for the "
            f"ranks with the same stages; the others wait for it"
        )


@dataclass
class PaceMeter:
    """Collects a rank's times; the same on every rank. `same` has for each rank those that hold the same stages."""

    mesh: Mesh
    interval: int
    same: list[list[int]]
    _recent: list[float] = field(default_factory=list)
    _best: list[float] = field(default_factory=list)
    _suspects: frozenset[int] = frozenset()
    _known: frozenset[int] = frozenset()

    def after_step(self, seconds: float) -> Pace | None:
        """The comparison, at the end of every interval; collective then. The first one only sets what is usual."""
        self._recent.append(seconds)
        if len(self._recent) < self.interval:
            return None
        mine, self._recent = fmean(self._recent), []
        everybody = torch.zeros(self.mesh.layout.world, dtype=torch.float64)
        everybody[self.mesh.rank] = mine
        if self.mesh.control is not None:
            dist.all_reduce(everybody, group=self.mesh.control)
        return self._compare(tuple(everybody.tolist()))

    def _compare(self, seconds: tuple[float, ...]) -> Pace | None:
        first, best = not self._best, self._best or [math.inf] * len(seconds)
        peers = [median_low([seconds[other] for other in ranks]) for ranks in self.same]
        usual = [min(own, peer, now) for own, peer, now in zip(best, peers, seconds, strict=True)]
        self._best = [min(own, now) for own, now in zip(best, seconds, strict=True)]
        if min(usual) <= 0 or (first and max(len(ranks) for ranks in self.same) == 1):
            return None
        ratios = tuple(now / u for now, u in zip(seconds, usual, strict=True))
        pace = Pace(seconds, ratios, self._suspects, self._known)
        self._known = self._suspects & frozenset(pace.stragglers)
        self._suspects = frozenset(pace.stragglers)
        return pace
