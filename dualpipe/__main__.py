"""`python -m dualpipe`: show, validate, simulate, plot, compare and search pipeline schedules."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dualpipe.arguments import add_costs, add_schedule, add_size, costs_from, schedule_from, stages_listed
from dualpipe.auto import EFFORT, Found, both_cuts, known_schedules, search
from dualpipe.compare import compare, comparison_table
from dualpipe.lanes_plot import save_lanes
from dualpipe.perfetto import to_perfetto
from dualpipe.plot import save_plot
from dualpipe.schedules import SCHEDULES, options_of
from dualpipe.simulator import simulate
from dualpipe.table import format_table
from dualpipe.validate import validate

INTRODUCTION = """\
Design, check, predict and draw pipeline schedules.

A schedule says what each rank of a pipeline computes, in order: 0F3 is the forward of micro-batch 3 on stage 0, 0B3
its backward, 0I3 and 0W3 the two halves of a split backward (gradient of inputs, gradient of weights), and
(0F3;7B1)OVERLAP_F_B a forward and a backward that run overlapped. This is the text form of
torch.distributed.pipelining, so schedules can be carried both ways.
"""


Commands = argparse._SubParsersAction


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
    _add_simulate(commands)
    _add_plot(commands)
    _add_pair(commands)
    _add_compare(commands)
    _add_search(commands)
    return parser


def _command(
    commands: Commands,
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


def _add_show(commands: Commands) -> None:
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


def _add_validate(commands: Commands) -> None:
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


def _add_simulate(commands: Commands) -> None:
    teach = """\
Runs the schedule on paper: a step starts when its rank is free and what it needs has arrived. Idle is the makespan
less what the rank computed; activations and deferred weight gradients are the most alive at once, in stages x
micro-batches. A split backward keeps its activation until W.

examples: python -m dualpipe simulate --schedule dualpipe --ranks 8 --micro-batches 20
          python -m dualpipe simulate --schedule zbv --ranks 4 --forward 1 --backward 2.3 --weights 0.9 --latency 0.1"""
    parser = _command(commands, "simulate", _simulate, "predict makespan, idle time and memory", teach)
    add_schedule(parser)
    add_costs(parser, early=True)


def _simulate(args: argparse.Namespace) -> None:
    schedule = schedule_from(args)
    validate(schedule)
    timeline = simulate(schedule, costs_from(args, schedule.num_stages), args.early)
    print(f"{schedule.name}: makespan {timeline.makespan:.6g}, bubble {timeline.bubble:.2%}\n")
    columns = (timeline.busy, timeline.idle, timeline.peak_activations, timeline.peak_deferred)
    rows = [(str(rank), *(f"{column[rank]:.6g}" for column in columns)) for rank in range(schedule.num_ranks)]
    print(format_table(("rank", "busy", "idle", "activations", "deferred W"), rows))


def _add_plot(commands: Commands) -> None:
    teach = """\
Simulates the schedule and draws it in the manner of the DualPipe report: rows are ranks, colours are kinds, numbers
are micro-batches, overlapped pairs share a border. The ending of each file says what is written: .svg or .png (these
need matplotlib), or .json, a trace for ui.perfetto.dev.

example: python -m dualpipe plot --schedule dualpipe --ranks 8 --micro-batches 20 --out dualpipe.svg --out trace.json"""
    parser = _command(commands, "plot", _plot, "draw the simulated timeline", teach)
    parser.add_argument(
        "--out", metavar="FILE", action="append", required=True, help="FILE.svg, .png or .json; may be repeated"
    )
    add_schedule(parser)
    add_costs(parser, early=True)


def _plot(args: argparse.Namespace) -> None:
    schedule = schedule_from(args)
    validate(schedule)
    timeline = simulate(schedule, costs_from(args, schedule.num_stages), args.early)
    for path in map(Path, args.out):
        try:
            if path.suffix == ".json":
                path.write_text(to_perfetto([timeline]), encoding="utf-8")
            else:
                save_plot([timeline], path)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from None
        print(path)


def _add_pair(commands: Commands) -> None:
    teach = """\
Prints the order in which an overlapped pair runs, as two lanes: forward (△) and backward (▲) of two micro-batches. A
layer is m (MoE), s (MoE with a shared expert) or d (dense). Communication stands where it starts; it is waited for
where its result is read. --out draws it, with every all-to-all as long as --communication attentions.

example: python -m dualpipe pair --forward mm --backward mm --out pair.svg"""
    parser = _command(commands, "pair", _pair, "show how a pair hides communication", teach)
    parser.add_argument("--forward", metavar="LAYERS", default="m", help="layers of the forward's stage (default m)")
    parser.add_argument("--backward", metavar="LAYERS", default="m", help="layers of the backward's stage (default m)")
    parser.add_argument("--communication", metavar="C", type=float, default=1.5, help="cost of an all-to-all")
    parser.add_argument("--out", metavar="FILE", type=Path, help="draw to FILE.svg or .png")


def _pair(args: argparse.Namespace) -> None:
    from dualpipe.overlap import pair_order, two_lanes  # loads torch, which the other commands do without
    from dualpipe.pair import pair_timeline, stage_segments

    forward, backward = stage_segments(args.forward), stage_segments(args.backward)
    if not 0 <= args.communication < float("inf"):
        raise ValueError(f"--communication {args.communication:g} must be finite and at least 0")
    order = pair_order(forward, backward)
    print(two_lanes(order))
    if args.out is not None:
        try:
            save_lanes(pair_timeline(order, forward, backward, args.communication), args.out, "attentions")
        except OSError as error:
            raise ValueError(f"cannot write {args.out}: {error.strerror}") from None
        print(args.out)


def _add_compare(commands: Commands) -> None:
    teach = """\
Two tables. At equal stages the model is cut into R stages, and schedules that hold two stages per rank use R/2 devices.
At equal devices everyone has R, and two stages on a rank are half as thick. The costs are those of an R-th of the
model. `formula` is the published bubble, `idle` the simulated one, over the ranks: they agree at the default costs and
approximate each other at others. `params` and `acts` are stages' worth on the fullest rank.

examples: python -m dualpipe compare --ranks 8 --micro-batches 20
          python -m dualpipe compare --ranks 8 --micro-batches 20 --backward 2.5 --weights 1.2 --overlap 0.914"""
    parser = _command(commands, "compare", _compare, "compare all schedules at equal stages and equal devices", teach)
    add_size(parser)
    add_costs(parser)


def _compare(args: argparse.Namespace) -> None:
    if args.ranks < 1 or args.micro_batches < 1:
        raise ValueError(f"--ranks {args.ranks} and --micro-batches {args.micro_batches} must be at least 1")
    costs = costs_from(args, args.ranks)
    for equal in ("stages", "devices"):
        print(f"Equal {equal}: {args.ranks} {equal}, {args.micro_batches} micro-batches\n")
        print(comparison_table(compare(costs, args.micro_batches, equal)), end="\n\n")


def _add_search(commands: Commands) -> None:
    teach = """\
Looks for the schedule of least makespan at your costs and within your memory, for a few seconds, over straight,
bidirectional and V placements, and prints it beside the known ones. It is never slower than a known one that fits. Give
the costs of R stages, or of 2R, twice as thin, as a V holds them; the other cut is made of yours. Memory is counted in
R-ths of the model x micro-batches, so all rows compare. The same arguments give the same schedule.

examples: python -m dualpipe search --ranks 4 --micro-batches 12 --forward 1.1,1,1,1.7 --backward 2.1,2,2,3.4 \\
              --weights 1.1,1,1,1.7 --overlap 0.8 --out found.csv
          python -m dualpipe plot --csv found.csv --out found.svg"""
    parser = _command(commands, "search", _search, "search for a schedule at given costs and memory", teach)
    add_size(parser)
    parser.add_argument("--max-activations", type=float, metavar="N", help="memory of a rank (default R + 1)")
    parser.add_argument("--single-copy", action="store_true", help="no bidirectional placement: parameters once")
    parser.add_argument("--effort", type=int, default=EFFORT, metavar="STEPS", help=f"default {EFFORT}: ~4 s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the schedule found as CSV")
    add_costs(parser)


def _search(args: argparse.Namespace) -> None:
    for option, value in (("--ranks", args.ranks), ("--effort", args.effort)):
        if value < 1:
            raise ValueError(f"{option} {value} must be at least 1")
    costs = costs_from(args, 2 * args.ranks if stages_listed(args) == 2 * args.ranks else args.ranks)
    found = search(
        args.ranks,
        args.micro_batches,
        costs,
        args.max_activations,
        bidirectional=not args.single_copy,
        effort=args.effort,
    )
    known = [f for cut in both_cuts(costs, args.ranks) for f in known_schedules(args.ranks, args.micro_batches, cut)]
    rows = [_found_row(f, found) for f in [found, *sorted(known, key=lambda f: f.order)]]
    print(format_table(("schedule", "stages", "directions", "activations", "makespan", "auto is"), rows))
    if args.out is not None:
        try:
            args.out.write_text(found.schedule.to_csv(), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot write {args.out}: {error.strerror}") from None
        print(f"\n{args.out}")


def _found_row(row: Found, best: Found) -> tuple[str, ...]:
    schedule, shorter = row.schedule, 1 - best.makespan / row.makespan if row.makespan else 0.0
    return (
        schedule.name, str(schedule.num_stages), str(schedule.num_directions), f"{row.activations:g}",
        f"{row.makespan:.6g}", "" if row is best else f"{abs(shorter):.1%} {'longer' if shorter < 0 else 'shorter'}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
