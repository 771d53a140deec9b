"""The process groups of ranks that serve together, and the small things that they tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.expert_groups import ExpertGroups
from parallel.replicated import everywhere


@dataclass(frozen=True)
class ServingGroups:
    """One rank's view; everything is None for a rank that is alone.

    tokens    for dispatch and combine
    control   for small integers and objects, between hosts (gloo)
    weights   for experts that move, between hosts (gloo)
    """

    tokens: ExpertGroups | None = None
    control: dist.ProcessGroup | None = None
    weights: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return 0 if self.tokens is None else self.tokens.position

    @property
    def size(self) -> int:
        return 1 if self.tokens is None else self.tokens.size

    def tell(self, numbers: Sequence[int]) -> Tensor:
        """Everybody's numbers: int64 [P, len(numbers)]. Raises RuntimeError on every rank if one is gone."""
        return everywhere(torch.tensor(numbers, dtype=torch.int64), self.control)

    def add_up(self, counts: Tensor) -> Tensor:
        """The sum of everybody's integers, on the host."""
        flat = counts.flatten().cpu()
        return everywhere(flat, self.control).sum(0).view(counts.shape)

    def gather(self, thing: Any) -> list[Any]:
        """Everybody's object, in the order of ranks."""
        if self.control is None:
            return [thing]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, thing, group=self.control)
        return found


def serving_groups(
    ranks: Sequence[int], timeout: timedelta = timedelta(minutes=5), backend: str | None = None
) -> ServingGroups:
    """Groups of these global ranks; every one of them calls this, and nobody else needs to.

    backend   of the groups for tokens: that of the default group if not given. The others are always gloo
    timeout   after which a rank that does not come counts as gone
    Raises ValueError if this process is not among them.
    """
    ranks = list(ranks)
    if dist.get_rank() not in ranks:
        raise ValueError(f"rank {dist.get_rank()} is not one of {ranks}")
    if len(ranks) == 1:
        return ServingGroups()

    def group(name: str | None) -> dist.ProcessGroup:
        made = dist.new_group(ranks, timeout=timeout, backend=name, use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        return made

    whole, counts, control, weights = group(backend), group(backend), group("gloo"), group("gloo")
    tokens = ExpertGroups(ranks.index(dist.get_rank()), len(ranks), 1, whole, counts)
    return ServingGroups(tokens, control, weights)
