"""Read a schedule from the CSV of `torch.distributed.pipelining`: bring your own, check it, draw it, run it.

One row per rank, one cell per step, an empty cell for "nothing". Both forms that PyTorch dumps are understood: the
compute form (`0F3`, `1B0`, `(0F3;7B1)OVERLAP_F_B`) and the one with communication (`0SEND_F3`, `1UNSHARD`, ...), whose
extra cells are passed over, because a Schedule derives its messages itself.

A CSV does not say where stages live, so the placement is read off the actions. If each stage stands on one rank
there is one direction. If it stands on two, the schedule must be bidirectional: the first half of the micro-batches
on one rank, the second half on the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from dualpipe.schedule import Placement, Schedule, Step, parse_step, parts

_COMMUNICATION = re.compile(r"\d+(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)\d*")
_LARGEST = 1_000_000  # no stage or micro-batch is numbered higher; keeps a typing error from filling the memory


def read_csv(text: str, name: str = "csv") -> Schedule:
    """Read a schedule. Raises ValueError, naming row and cell, on anything that is not one.

    The result is well-formed and placed, but not yet checked for completeness and deadlock: see `validate`.
    """
    lines = text.rstrip().splitlines()
    rows = tuple(tuple(_row(line, number)) for number, line in enumerate(lines, start=1))
    home = _homes(rows)
    if not home:
        raise ValueError(f"{name}: no action found; write one CSV row per rank, e.g. 0F0,0F1,0B0,0B1")
    num_stages = 1 + max(stage for stage, _ in home)
    num_micro_batches = 1 + max(micro_batch for _, micro_batch in home)
    return Schedule(name, num_micro_batches, _placement(home, num_stages, num_micro_batches), rows)


def _row(line: str, number: int) -> Iterable[Step]:
    for column, cell in enumerate(line.split(","), start=1):
        text = cell.strip()
        if not text or _COMMUNICATION.fullmatch(text):
            continue
        if not text.isascii() or len(text) > 60:
            raise ValueError(f"row {number}, cell {column}: {text[:60]!r} is not an action; write e.g. 0F3, 2I1 or 1B0")
        try:
            step = parse_step(text)
        except ValueError as error:
            raise ValueError(f"row {number}, cell {column}: {error}") from None
        if any(max(a.stage, a.micro_batch) > _LARGEST for a in parts(step)):
            raise ValueError(f"row {number}, cell {column}: {text} has a number above {_LARGEST}")
        yield step


def _homes(rows: tuple[tuple[Step, ...], ...]) -> dict[tuple[int, int], int]:
    """The rank of each (stage, micro-batch)."""
    home: dict[tuple[int, int], int] = {}
    for rank, row in enumerate(rows):
        for action in (a for step in row for a in parts(step)):
            first = home.setdefault((action.stage, action.micro_batch), rank)
            if first != rank:
                raise ValueError(
                    f"stage {action.stage} of micro-batch {action.micro_batch} stands on rank {first} "
                    f"and on rank {rank}; keep its forward and its backward on one"
                )
    return home


def _placement(home: Mapping[tuple[int, int], int], num_stages: int, num_micro_batches: int) -> Placement:
    ranks: dict[int, set[int]] = {}
    for (stage, _), rank in home.items():
        ranks.setdefault(stage, set()).add(rank)
    if len(ranks) < num_stages:
        absent = next(s for s in range(num_stages) if s not in ranks)
        raise ValueError(f"stage {absent} has no action, though there is a stage {num_stages - 1}")
    if all(len(found) == 1 for found in ranks.values()):
        return (tuple(min(ranks[stage]) for stage in range(num_stages)),)
    if num_micro_batches % 2:
        stage = next(s for s in range(num_stages) if len(ranks[s]) > 1)
        raise ValueError(
            f"stage {stage} stands on ranks {_list(ranks[stage])}, so there are two directions, "
            f"which cannot share {num_micro_batches} micro-batches equally"
        )
    half = num_micro_batches // 2
    directions: list[dict[int, int]] = [{}, {}]
    for (stage, micro_batch), rank in home.items():
        if directions[micro_batch >= half].setdefault(stage, rank) != rank:
            raise ValueError(
                f"stage {stage} stands on ranks {_list(ranks[stage])}; allowed is one rank, or one for micro-batches "
                f"0..{half - 1} and another for {half}..{num_micro_batches - 1}"
            )
    for first, last, found in ((0, half - 1, directions[0]), (half, num_micro_batches - 1, directions[1])):
        if len(found) < num_stages:
            absent = next(s for s in range(num_stages) if s not in found)
            raise ValueError(f"stage {absent} has no action for micro-batches {first}..{last}")
    return tuple(tuple(found[stage] for stage in range(num_stages)) for found in directions)


def _list(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
