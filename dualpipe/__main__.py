"""`python -m dualpipe`: show, validate, simulate, plot, compare and search pipeline schedules."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from dualpipe.arguments import add_schedule, schedule_from
from dualpipe.schedules import SCHEDULES, options_of
from dualpipe.validate import validate

INTRODUCTION = """\
Design, check, predict and draw pipeline schedules.

A schedule says what each rank of a pipeline computes, in order: 0F3 is the forward of micro-batch 3 on stage 0, 0B3
its backward, 0I3 and 0W3 the two halves of a split backward (gradient of inputs, gradient of weights), and
(0F3;7B1)OVERLAP_F_B a forward and a backward that run overlapped. This is the text form of
torch.distributed.pipelining, so schedules can be carried both ways.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Bad input prints one line and returns 2."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        print(f"dualpipe {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        sys.stderr.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dualpipe", description=INTRODUCTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_show(commands)
    _add_validate(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    teach: str,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{teach}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_show(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    named = "\n".join(f"  {name:18} {_summary(name)}" for name in SCHEDULES)
    teach = (
        f"The schedules:\n{named}\n\nexample: python -m dualpipe show --schedule dualpipe --ranks 8 --micro-batches 20"
    )
    add_schedule(_command(commands, "show", _show, "print a schedule as CSV, one row per rank", teach))


def _summary(name: str) -> str:
    """The first line of the generator's module, without its source, and the options."""
    first = (sys.modules[SCHEDULES[name].__module__].__doc__ or "").splitlines()[0]
    options = "".join(f" [--option {key}={value}]" for key, value in options_of(name).items())
    return first.split(" (")[0].rstrip(".") + options


def _show(args: argparse.Namespace) -> None:
    print(schedule_from(args).to_csv(), end="")


def _add_validate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    teach = """\
A schedule is correct if every micro-batch passes every stage once forward and once backward (B, or I and W), each
action stands on the rank that holds its stage, and no ranks wait for each other for ever. The first fault is named,
and the exit status is then 2.

examples: python -m dualpipe validate --schedule zbv --ranks 4 --micro-batches 12
          python -m dualpipe validate --csv my_schedule.csv"""
    add_schedule(_command(commands, "validate", _validate, "check that a schedule is correct", teach))


def _validate(args: argparse.Namespace) -> None:
    schedule = schedule_from(args)
    validate(schedule)
    directions = "direction" if schedule.num_directions == 1 else "directions"
    print(
        f"{schedule.name} is valid: {schedule.num_ranks} ranks, {schedule.num_stages} stages, "
        f"{schedule.num_micro_batches} micro-batches, {schedule.num_directions} {directions}"
    )


if __name__ == "__main__":
    sys.exit(main())
