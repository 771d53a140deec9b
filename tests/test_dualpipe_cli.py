"""`python -m dualpipe` as a user meets it: what each command prints, and one clear line when the input is bad."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dualpipe.__main__ import main
from dualpipe.schedules import SCHEDULES, make_schedule

COMMANDS = ["show", "validate", "simulate", "plot", "compare", "search"]


def test_show_as_a_process_prints_one_row_per_rank_without_loading_torch() -> None:
    code = (
        "import sys, runpy; sys.argv[0] = 'dualpipe'; runpy.run_module('dualpipe', run_name='__main__', alter_sys=True)"
    )
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); {code}"
    command = [sys.executable, "-c", code, "show", "--schedule", "dualpipe", "--ranks", "8", "--micro-batches", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout == make_schedule("dualpipe", 8, 20).to_csv()
    assert len(done.stdout.splitlines()) == 8
    assert done.stderr == "False\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m dualpipe {command} " in text
    assert "--ranks R" in text


def test_show_lists_every_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in SCHEDULES)
    assert "--option chunks=2" in text


def test_validate_accepts_a_csv_and_names_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(make_schedule("interleaved_1f1b", 2, 4, chunks=3).to_csv())
    assert main(["validate", "--csv", str(file)]) == 0
    assert capsys.readouterr().out == "mine is valid: 2 ranks, 6 stages, 4 micro-batches, 1 direction\n"
    file.write_text("0F0,0B0\n1B0,1F0\n")
    assert main(["validate", "--csv", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dualpipe validate: deadlock: rank 0 waits at 0B0 for 1B0")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "--schedule", "nonsense"], "unknown schedule 'nonsense'"),
        (["show", "--schedule", "dualpipe", "--ranks", "3"], "even number of ranks; got 3"),
        (["show", "--schedule", "zbv", "--option", "chunks"], "write KEY=NUMBER"),
        (["show", "--schedule", "zbv", "--option", "chunks=2"], "zbv has no option 'chunks'"),
        (["validate", "--csv", "/no/such/file"], "cannot read /no/such/file"),
        (["simulate", "--schedule", "zb1p", "--forward", "1,2"], "--forward lists 2 stages, but there are 8"),
        (["simulate", "--schedule", "zb1p", "--weights", "3"], "--weights 3 is more than --backward 2"),
        (["simulate", "--schedule", "zb1p", "--latency", "-1"], "at least 0; got -1.0"),
        (["compare", "--ranks", "0"], "--ranks 0"),
        (["show", "--schedule", "dualpipe", "--ranks", "0"], "--ranks 0 must be at least 1"),
        (["simulate", "--schedule", "zbv", "--micro-batches", "-1"], "--micro-batches -1 must be at least 1"),
        (["search", "--ranks", "0"], "--ranks 0 must be at least 1"),
    ],
)
def test_bad_input_gives_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_simulate_prints_the_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--schedule", "dualpipe", "--ranks", "8", "--micro-batches", "20"]) == 0
    first, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert first == "dualpipe: makespan 66, bubble 9.09%"
    assert head.split() == ["rank", "busy", "idle", "activations", "deferred", "W"]
    assert [row.split()[:4] for row in rows] == [[str(rank), "60", "6", "9"] for rank in range(8)]


def test_compare_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--ranks", "8", "--micro-batches", "20"]) == 0
    stages, devices = capsys.readouterr().out.split("Equal devices")
    rows = {line.split()[0]: line.split()[1:] for line in stages.splitlines() if line}
    assert rows["dualpipe"] == ["8", "8", "6", "6", "0", "9.1%", "2×", "9", "66"]
    assert rows["dualpipev"] == ["4", "8", "6", "6", "0", "4.8%", "2×", "9", "126"]
    assert "zb1p" in devices


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("search --ranks 2 --micro-batches 4 --max-activations nan", "max_activations=nan is no amount of memory"),
        ("search --ranks 2 --micro-batches 4 --max-activations inf", "max_activations=inf is no amount of memory"),
        ("show --schedule interleaved_1f1b --ranks 4 --option chunks=99999999", "would have 7999999920 forwards"),
        ("show --schedule zbv --ranks 100000 --micro-batches 100000", "would have 10000000000 forwards"),
        ("search --ranks 2 --micro-batches 30000000 --effort 1", "up to 120000000 forwards"),
        ("pair --communication inf --out x.svg", "--communication inf must be finite"),
        ("compare --ranks 4 --micro-batches -1", "--ranks 4 and --micro-batches -1 must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_give_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("simulate --schedule zbv --forward x", "argument --forward: 'x': write a number, or one per stage"),
        ("compare --early", "unrecognized arguments: --early"),  # it would change nothing
        ("search --early", "unrecognized arguments: --early"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(line.split())
    assert done.value.code == 2
    assert message in capsys.readouterr().err
