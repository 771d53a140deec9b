"""Where to cut a model of unequal layers into stages, given what each layer costs.

The heaviest stage should be as light as can be. Under a bidirectional or V placement a rank holds stage s and stage
S−1−s: then, among the cuts that do that, the one with the evenest sums. (The sums alone are no good measure:
a cut into stages of 1, 1, 8, 8, 8, 8, 15 and 12 layers has even sums, and fills and drains slowly.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dualpipe.costs import Costs


@dataclass(frozen=True)
class Work:
    """The time of some layers on one micro-batch: F, I and W, and `overlap` as in `Costs`."""

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0
    overlap: float = 1.0

    @property
    def alone(self) -> float:
        return self.forward + self.inputs + self.weights

    @property
    def paired(self) -> float:
        """Its part of overlapped pairs."""
        return self.overlap * self.alone

    def __add__(self, other: Work) -> Work:
        both = self.alone + other.alone
        return Work(
            self.forward + other.forward,
            self.inputs + other.inputs,
            self.weights + other.weights,
            (self.paired + other.paired) / both if both else 1.0,
        )


@dataclass(frozen=True)
class ModelWork:
    """A model as a row of layers, with what the first stage does before them and the last one after them."""

    layers: tuple[Work, ...]
    first: Work = Work()
    last: Work = Work()
    latency: float = 0.0  # of a message between stages
    transfer: float = 0.0  # how long a message occupies its link

    def stages(self, sizes: Sequence[int]) -> Costs:
        """What stages of so many layers cost. Raises ValueError unless the sizes add up to the layers."""
        if sum(sizes) != len(self.layers):
            raise ValueError(f"stages of {list(sizes)} layers do not add up to the model's {len(self.layers)}")
        works, start = [], 0
        for size in sizes:
            works.append(sum(self.layers[start : start + size], Work()))
            start += size
        works[0], works[-1] = (
            self.first + works[0],
            (works[-1] if len(works) > 1 else self.first + works[0]) + self.last,
        )
        overlaps = tuple(work.overlap for work in works)
        costs = Costs(
            forward=tuple(work.forward for work in works),
            inputs=tuple(work.inputs for work in works),
            weights=tuple(work.weights for work in works),
            overlap=overlaps[0] if len(set(overlaps)) == 1 else overlaps,
        )
        return replace(costs, latency=self.latency, size=self.transfer, bandwidth=1.0)

    def balanced(self, num_stages: int, mirrored: bool, pairs: bool = True) -> tuple[int, ...]:
        """The layers per stage that make the heaviest stage lightest, and then the most loaded rank.

        mirrored   rank r holds stages r and S−1−r (bidirectional and V placements); else one stage per rank counts
        pairs      weigh work as it takes inside overlapped pairs

        Raises ValueError if there are fewer layers than stages.
        """
        if not 1 <= num_stages <= len(self.layers):
            raise ValueError(f"{len(self.layers)} layers cannot fill {num_stages} stages")
        times = [work.paired if pairs else work.alone for work in (self.first, *self.layers, self.last)]
        return balanced_sizes(times[1:-1], num_stages, times[0], times[-1], mirrored and num_stages % 2 == 0)


def balanced_sizes(
    times: Sequence[float], num_stages: int, first: float, last: float, mirrored: bool
) -> tuple[int, ...]:
    """`ModelWork.balanced` for layers of these times."""
    total = [0.0]
    for time in times:
        total.append(total[-1] + time)
    sizes = _in_a_row(total, num_stages, first, last)
    return _from_both_ends(total, num_stages, first, last, sizes) if mirrored else sizes


Best = tuple[float, float, tuple[int, ...]]  # most loaded rank, sum of squares over the stages, sizes


def _in_a_row(total: Sequence[float], num_stages: int, first: float, last: float) -> tuple[int, ...]:
    """Least maximum over single stages: best[i] is how the stages so far share the first i layers."""
    count = len(total) - 1
    best: dict[int, Best] = {0: (0.0, 0.0, ())}
    for stage in range(num_stages):
        extra = first * (stage == 0) + last * (stage == num_stages - 1)
        after: dict[int, Best] = {}
        for done, (most, squares, sizes) in best.items():
            ends = range(done + 1, count - (num_stages - stage - 1) + 1) if stage < num_stages - 1 else (count,)
            for end in ends:
                load = total[end] - total[done] + extra
                new = (max(most, load), squares + load * load, (*sizes, end - done))
                after[end] = min(after.get(end, new), new)
        best = after
    return best[count][2]


def _from_both_ends(
    total: Sequence[float], num_stages: int, first: float, last: float, start: tuple[int, ...]
) -> tuple[int, ...]:
    """Least maximum over sums of a stage and its mirror, from the outermost pair inwards, with stages no heavier than
    those of `start`.

    best[i, j] is how the pairs so far share the first i and the last j layers; `start` is an answer to improve on.
    """
    count, half = len(total) - 1, num_stages // 2
    loads = _loads(total, start, first, last)
    bound = max(one + two for one, two in zip(loads, loads[::-1], strict=True)) * (1 + 1e-12)
    heaviest = max(loads) * (1 + 1e-12)
    best: dict[tuple[int, int], Best] = {(0, 0): (0.0, 0.0, ())}
    for turn in range(half):
        after: dict[tuple[int, int], Best] = {}
        for (front, back), (most, squares, sizes) in best.items():
            left = count - front - back - 2 * (half - turn - 1)  # for this pair, one layer kept for each later stage
            for size in range(1, left):
                one = total[front + size] - total[front] + first * (turn == 0)
                if one > heaviest:
                    break
                for other in range(1, left - size + 1) if turn < half - 1 else (left - size,):
                    two = total[count - back] - total[count - back - other] + last * (turn == 0)
                    if one + two > bound or two > heaviest:
                        break
                    new = (max(most, one + two), squares + one * one + two * two, (*sizes, size, other))
                    key = front + size, back + other
                    after[key] = min(after.get(key, new), new)
        best = after
    sizes = min(best.values(), default=(math.inf, 0.0, ()))[2]
    return (*sizes[::2], *sizes[1::2][::-1]) if sizes else start


def _loads(total: Sequence[float], sizes: tuple[int, ...], first: float, last: float) -> list[float]:
    """The time of each stage."""
    ends = [sum(sizes[: s + 1]) for s in range(len(sizes))]
    loads = [total[end] - total[end - size] for end, size in zip(ends, sizes, strict=True)]
    loads[0], loads[-1] = loads[0] + first, loads[-1] + last
    return loads
