"""What each logger writes, what it forgets on a resume, and that none of them can end a run."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console

from dualpipe.schedules import make_schedule
from training.config import Config
from training.heatmap import HeatMap
from training.loggers import (
    CompositeLogger,
    ConsoleLogger,
    JsonlLogger,
    RunLogger,
    WandbLogger,
    new_run_id,
    status_line,
)
from training.run_logging import code_version, make_logger, show_plan
from training.tensorboard import TensorBoardLogger, check_tensorboard

METRICS = {
    "train/loss": 2.5,
    "train/tokens_per_second": 8120.4,
    "train/grad_norm": 0.91,
    "balance/max_vio": 0.31,
    "train/lr": 1e-3,
}


def rows(path: Path) -> list[dict]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# --- the file ---


def test_jsonl_rows_are_there_before_close(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.log(1, {"train/loss": 2.5, "val/loss": math.nan})
    logger.log(2, {"train/loss": math.inf, "train/grad_norm": -math.inf})
    logger.text(2, "val/sample", 'two\nlines "quoted" \x1b ä')
    logger.image(2, "curve", Path("curve.png"))
    logger.table(3, "balance/load", HeatMap(("layers.1", "layers.2"), [[3, 4], [0.5, math.nan]]))
    assert rows(path) == [
        {"step": 1, "train/loss": 2.5, "val/loss": "nan"},
        {"step": 2, "train/loss": "inf", "train/grad_norm": "-inf"},
        {"step": 2, "val/sample": 'two\nlines "quoted" \x1b ä'},
        {"step": 2, "curve": "curve.png"},
        {"step": 3, "balance/load": {"layers.1": [3, 4], "layers.2": [0.5, "nan"]}},
    ]
    logger.close()


@settings(deadline=None)
@given(steps=st.lists(st.integers(0, 9), max_size=12), cut=st.integers(0, 30), resume_step=st.integers(0, 9))
def test_jsonl_resume_keeps_whole_rows_up_to_the_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], cut: int, resume_step: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    logger = JsonlLogger(path)
    for i, step in enumerate(steps):
        logger.log(step, {"i": i})
    logger.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])  # what a crash of the machine may leave
    survived = path.read_bytes().count(b"\n")

    logger = JsonlLogger(path, resume_step)
    logger.log(resume_step + 1, {"i": -1})
    logger.close()
    expected = [{"step": s, "i": i} for i, s in enumerate(steps[:survived]) if s <= resume_step]
    assert rows(path) == [*expected, {"step": resume_step + 1, "i": -1}]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_jsonl_drops_what_is_not_a_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\0\0\0\n{"step": 1}\n[]\n{"loss": 2}\n{"step": null}\n\xff\n{"step": 2}\n')
    JsonlLogger(path, 5).close()
    assert rows(path) == [{"step": 1}, {"step": 2}]


# --- the terminal ---


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 2.0
        return self.now


def test_status_line() -> None:
    line = status_line(20, 400, METRICS, 3723.4)
    assert line == " 20/400  loss 2.5000  tok/s 8,120  norm 0.910  MaxVio 0.310  ETA 1:02:03"
    assert status_line(1, 2, {"train/loss": math.nan}, None) == "1/2  loss nan"


def test_plain_console_prints_at_the_interval() -> None:
    out = io.StringIO()
    logger = ConsoleLogger(95, interval=10, console=Console(file=out, width=40), clock=Clock())
    for step in range(51, 96):
        logger.log(step, {**METRICS, "train/loss": float(step)})
        if step == 75:
            logger.log(step, {"val/loss": 1.75})
    logger.close()
    lines = out.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines] == ["60", "70", "75", "80", "90", "95"]
    assert "loss 60.0000" in lines[0] and "val" not in lines[0] and lines[0].endswith("ETA 0:01:10")
    assert "val 1.7500" in lines[2] and "val 1.7500" in lines[5] and lines[5].endswith("ETA 0:00:00")


def test_terminal_console_redraws_one_line() -> None:
    out = io.StringIO()
    logger = ConsoleLogger(4, console=Console(file=out, force_terminal=True, width=120), clock=Clock())
    for step in range(1, 5):
        logger.log(step, METRICS)
    logger.close()
    logger.close()
    text = out.getvalue()
    assert all(f"{step}/4  loss 2.5000" in text for step in range(1, 5))
    assert text.count("\n") <= 2
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_console_shows_hostile_text_harmlessly() -> None:
    out = io.StringIO()
    logger = ConsoleLogger(4, console=Console(file=out, width=40))
    logger.text(2, "val/sample", "[red]def f(x):\n\treturn\x1b]0;title\x07 [/red] ä")
    logger.image(2, "curve", Path("/run/curve.png"))
    assert "[red]def f(x):" in out.getvalue() and "·]0;title· [/red] ä" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert "curve at step 2: /run/curve.png" in out.getvalue()


# --- Weights & Biases ---


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine where nobody has ever logged in."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "run"


def log_something(logger: RunLogger, step: int, tmp_path: Path) -> None:
    from PIL import Image

    image = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(image)
    logger.log(step, {"train/loss": 1.5, "train/grad_norm": math.nan})
    logger.text(step, "val/sample", "a < b")
    logger.image(step, "curve", image)
    logger.table(step, "balance/load", HeatMap(("layers.1",), [[1, 2, 3]]))
    logger.close()
    logger.log(step + 1, {"train/loss": 1.0})  # after close: ignored


def stored(run_path: Path) -> bytes:
    """The run's record on disk. Its last block is written by W&B's service process, which may be behind us."""
    import wandb

    wandb.teardown()  # what the interpreter does at exit: waits for the service
    (record,) = run_path.glob("*.wandb")
    return record.read_bytes()


def test_wandb_offline_writes_a_run_and_goes_on_under_the_same_id(
    wandb_home: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "openai", raising=False)  # W&B advertises where other tests have imported it
    run_id = new_run_id()
    paths = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # the logger's own word for trouble
        for step in (1, 2):
            logger = WandbLogger(wandb_home, run_id, "test", name="a run", config={"model": {"d": 8}}, tags=["t"])
            log_something(logger, step, tmp_path)
            paths.append(logger.run_path)
    assert len(set(paths)) == 2
    for path in paths:
        assert path.parent == wandb_home / "wandb"
        assert path.name.startswith("offline-run-") and run_id in path.name
        assert b"train/loss" in stored(path) and b"a run" in stored(path)
        media = sorted(file.suffix for file in (path / "files" / "media").rglob("*") if file.is_file())
        assert media == [".html", ".png", ".png"]
    assert capfd.readouterr() == ("", "")


def test_wandb_online_without_a_key_falls_back_without_asking(
    wandb_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user"))
    with pytest.warns(RuntimeWarning, match="could not start online.*no API key found") as caught:
        logger = WandbLogger(wandb_home, new_run_id(), "test", mode="online")
        log_something(logger, 1, tmp_path)
    assert [w.category for w in caught].count(RuntimeWarning) == 1
    assert logger.run_path is not None and logger.run_path.name.startswith("offline-run-")


def test_wandb_unreachable_falls_back(wandb_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.warns(RuntimeWarning, match="could not start online") as caught:
        logger = WandbLogger(wandb_home, new_run_id(), "test", mode="online", patience_s=2)
        log_something(logger, 1, tmp_path)
    wandb.teardown()
    assert [w.category for w in caught].count(RuntimeWarning) == 1
    assert logger.run_path is not None and logger.run_path.name.startswith("offline-run-")


def test_broken_wandb_does_not_end_the_run(wandb_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = WandbLogger(wandb_home, new_run_id(), "test")
    with pytest.warns(RuntimeWarning, match=r"could not log something.*No such file") as caught:
        for step in (1, 2):
            logger.image(step, "curve", tmp_path / "missing.png")
        log_something(logger, 3, tmp_path)
    assert [w.category for w in caught].count(RuntimeWarning) == 1
    assert b"train/loss" in stored(logger.run_path)

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(RuntimeWarning, match=r"could not start offline \(ModuleNotFoundError"):
        logger = WandbLogger(wandb_home, new_run_id(), "test")
    log_something(logger, 1, tmp_path)
    assert logger.run_path is None
    with pytest.raises(ValueError, match=r"logger\.mode=on is unknown"):
        WandbLogger(wandb_home, new_run_id(), "test", mode="on")  # type: ignore[arg-type]


# --- together ---


class Recorder:
    def __init__(self, calls: list, fails: bool = False) -> None:
        self.calls = calls
        self.fails = fails

    def log(self, step: int, metrics: dict) -> None:
        self.calls.append(("log", step, metrics))

    def text(self, step: int, name: str, text: str) -> None:
        self.calls.append(("text", step, name, text))

    def image(self, step: int, name: str, path: Path) -> None:
        self.calls.append(("image", step, name, path))

    def table(self, step: int, name: str, table: HeatMap) -> None:
        self.calls.append(("table", step, name, table))

    def close(self) -> None:
        self.calls.append("close")
        if self.fails:
            raise OSError("disk full")


@pytest.mark.parametrize("failing", [0, 1])
def test_composite_reaches_and_closes_all(failing: int) -> None:
    first: list = []
    second: list = []
    logger = CompositeLogger([Recorder(first, fails=failing == 0), Recorder(second, fails=failing == 1)])
    logger.log(1, {"train/loss": 2.0})
    logger.text(1, "a", "b")
    logger.image(1, "c", Path("d"))
    table = HeatMap(("a",), [[1]])
    logger.table(1, "e", table)
    with pytest.raises(OSError, match="disk full"):
        logger.close()
    assert first == second
    calls = [("log", 1, {"train/loss": 2.0}), ("text", 1, "a", "b"), ("image", 1, "c", Path("d"))]
    assert first == [*calls, ("table", 1, "e", table), "close"]


def test_run_ids() -> None:
    ids = {new_run_id() for _ in range(200)}
    assert len(ids) == 200
    assert all(len(i) == 8 and i.isalnum() and i == i.lower() for i in ids)


# --- TensorBoard ---


def test_tensorboard_holds_all_kinds_and_hides_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = tmp_path / "curve.png"
    Figure().savefig(picture)
    for resume_step, last in ((0, 3), (1, 2)):
        logger = TensorBoardLogger(tmp_path, resume_step)
        for step in range(resume_step + 1, last + 1):
            logger.log(step, {"train/loss": 10.0 * resume_step + step})
        logger.text(last, "sample", "import \x1b os")
        logger.image(last, "curve", picture)
        logger.table(last, "balance/load", HeatMap(("layers.1",), [[1, 2, 3]]))
        logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 12.0)]
    assert {"curve", "balance/load"} <= set(events.Tags()["images"])
    assert b"import \xc2\xb7 os" in events.Tensors("sample/text_summary")[-1].tensor_proto.string_val[0]


def test_a_missing_tensorboard_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.tensorboard.PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"pip install -e '\.\[tensorboard\]'"):
        check_tensorboard()


# --- what a run shows and keeps ---


def test_the_plan_and_a_checkpoint_reach_wandb(wandb_home: Path, tmp_path: Path) -> None:
    config = Config(run="kept")
    config.logger.artifacts, config.logger.group = True, "the group"
    logger, wandb = make_logger(config, wandb_home, 0, new_run_id(), pytest.fail)
    assert wandb is not None and wandb.run_path is not None
    show_plan(logger, wandb_home, "node  ranks", make_schedule("dualpipe", 2, 4))
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "weights").write_bytes(b"1234")
    wandb.checkpoint(config.run, tmp_path / "step_1")
    logger.close()
    written = stored(wandb.run_path)
    for word in (b"the group", b"code_version", b"kept", b"schedule"):
        assert word in written, word
    assert {"ranks", "schedule"} <= {name for row in rows(wandb_home / "metrics.jsonl") for name in row}
    assert (wandb_home / "schedule.png").stat().st_size > 1000


def test_the_code_version_is_that_of_the_repository() -> None:
    assert re.fullmatch(r"unknown|[0-9A-Za-z.-]{7,}", code_version())
