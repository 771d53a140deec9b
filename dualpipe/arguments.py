"""Command-line arguments that several commands share: which schedule, and at what costs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dualpipe.costs import Costs
from dualpipe.csvio import read_csv
from dualpipe.schedule import Schedule
from dualpipe.schedules import SCHEDULES, make_schedule


def add_schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which schedule", "Generate one by name, or read one from a CSV file.")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--schedule", metavar="NAME", help=f"one of {', '.join(SCHEDULES)}")
    source.add_argument(
        "--csv",
        metavar="FILE",
        help="a CSV of torch.distributed.pipelining, one row per rank, which says itself how many ranks and "
        "micro-batches there are; - is standard input",
    )
    add_size(group)
    group.add_argument(
        "--option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of the schedule, e.g. chunks=3 for interleaved_1f1b; may be repeated",
    )


def add_size(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument("--ranks", type=int, default=8, metavar="R", help="number of pipeline ranks (default 8)")
    parser.add_argument(
        "--micro-batches", type=int, default=20, metavar="M", help="micro-batches per training step (default 20)"
    )


def schedule_from(args: argparse.Namespace) -> Schedule:
    if args.csv is None:
        for option, value in (("--ranks", args.ranks), ("--micro-batches", args.micro_batches)):
            if value < 1:
                raise ValueError(f"{option} {value} must be at least 1")
        return make_schedule(args.schedule, args.ranks, args.micro_batches, **dict(map(_option, args.option)))
    try:
        text = Path("/dev/stdin" if args.csv == "-" else args.csv).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {args.csv}: {error}") from None
    return read_csv(text, name=Path(args.csv).stem if args.csv != "-" else "csv")


def _option(text: str) -> tuple[str, int]:
    key, _, value = text.partition("=")
    if not key or not value.isascii() or not value.isdigit():
        raise ValueError(f"--option {text}: write KEY=NUMBER, e.g. chunks=3")
    return key, int(value)


def add_costs(parser: argparse.ArgumentParser, early: bool = False) -> None:
    """`early`: offer --early too, for commands that simulate one schedule."""
    group = parser.add_argument_group(
        "costs",
        "Times in any one unit. One number holds for every stage; a list such as 1,1,1,1.5 gives each stage its own. "
        "The defaults are those at which the published formulas are exact.",
    )
    group.add_argument("--forward", type=_times, default=(1.0,), metavar="F", help="forward of one stage (default 1)")
    group.add_argument("--backward", type=_times, default=(2.0,), metavar="B", help="full backward (default 2)")
    group.add_argument(
        "--weights", type=_times, default=(1.0,), metavar="W", help="the weight gradient's part of B (default 1)"
    )
    group.add_argument(
        "--overlap",
        type=_times,
        default=(1.0,),
        metavar="X",
        help="time of an overlapped pair as a part of F + B: 1 hides nothing, 0.8 hides a fifth (default 1); a list "
        "gives each stage its own",
    )
    if early:
        group.add_argument(
            "--early",
            action="store_true",
            help="results leave as soon as they are there, as in the runtime, not at the end of their step",
        )
    group.add_argument("--latency", type=float, default=0.0, metavar="T", help="delay of a message (default 0)")
    group.add_argument(
        "--transfer", type=float, default=0.0, metavar="T", help="time a message occupies its link (default 0)"
    )


def costs_from(args: argparse.Namespace, num_stages: int) -> Costs:
    forward, backward, weights = (
        _per_stage(name, getattr(args, name), num_stages) for name in ("forward", "backward", "weights")
    )
    for b, w in zip(backward, weights, strict=True):
        if w > b:
            raise ValueError(f"--weights {w:g} is more than --backward {b:g}, of which it is a part")
    return Costs(
        forward=forward,
        inputs=tuple(b - w for b, w in zip(backward, weights, strict=True)),
        weights=weights,
        backward=backward,
        overlap=args.overlap[0] if len(args.overlap) == 1 else _per_stage("overlap", args.overlap, num_stages),
        latency=args.latency,
        size=args.transfer,
        bandwidth=1.0,
    )


def stages_listed(args: argparse.Namespace) -> int:
    """How many stages the longest list of costs names; 1 if there is none."""
    return max(len(getattr(args, name)) for name in ("forward", "backward", "weights", "overlap"))


def _times(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number, or one per stage, e.g. 1,1,1,1.5") from None


def _per_stage(name: str, times: Sequence[float], num_stages: int) -> tuple[float, ...]:
    if len(times) == 1:
        return tuple(times) * num_stages
    if len(times) != num_stages:
        raise ValueError(f"--{name} lists {len(times)} stages, but there are {num_stages}")
    return tuple(times)
