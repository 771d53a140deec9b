"""Where a run's numbers go: a file, the terminal, Weights & Biases.

A metric has a name such as "train/loss" and is logged with the step it belongs to: step s is the state after s
updates. Only one process logs. Logging must never end a run: a value that is not finite is written as a word, and a
W&B that fails is warned about once.

After an interruption the steps since the last checkpoint are done again. The file forgets the first attempt, so each
step stands in it once; W&B keeps the first attempt's points, which are equal because resumption is exact.
"""

from __future__ import annotations

import html
import json
import math
import os
import secrets
import string
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from training.heatmap import HeatMap

Metrics = Mapping[str, float]


class RunLogger(Protocol):
    def log(self, step: int, metrics: Metrics) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def image(self, step: int, name: str, path: Path) -> None: ...

    def table(self, step: int, name: str, table: HeatMap) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


def new_run_id() -> str:
    """Eight lower-case letters and digits, from the system's randomness: it neither uses nor moves any seed."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def printable(text: str) -> str:
    """Text that cannot command a terminal: an untrained model writes escape sequences too."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)


class CompositeLogger:
    """Passes everything on to several loggers, and closes each of them even when one fails to."""

    def __init__(self, loggers: Sequence[RunLogger]) -> None:
        self.loggers = tuple(loggers)

    def log(self, step: int, metrics: Metrics) -> None:
        for logger in self.loggers:
            logger.log(step, metrics)

    def text(self, step: int, name: str, text: str) -> None:
        for logger in self.loggers:
            logger.text(step, name, text)

    def image(self, step: int, name: str, path: Path) -> None:
        for logger in self.loggers:
            logger.image(step, name, path)

    def table(self, step: int, name: str, table: HeatMap) -> None:
        for logger in self.loggers:
            logger.table(step, name, table)

    def rewind(self, step: int) -> None:
        """The run has gone back to `step`: later steps will be logged again, with other numbers."""
        for logger in self.loggers:
            logger.rewind(step)

    def close(self) -> None:
        with ExitStack() as stack:
            for logger in reversed(self.loggers):
                stack.callback(logger.close)


class JsonlLogger:
    """One JSON object a line: {"step": 7, "train/loss": 2.5, ...}; texts and the paths of images are strings, tables
    are lists of numbers by row: {"step": 25, "balance/load": {"layers.1": [310, 287, ...], ...}}.

    What is not finite becomes "nan", "inf" or "-inf": valid JSON, and Python's `float` reads it back. Every line is
    handed to the system at once, so a killed process loses none.

    resume_step   the step of the checkpoint that the run goes on from, 0 for none: rows of later steps in an
                  existing file are dropped first, and lines that a crash left incomplete.
    on_failure    told why when a line cannot be written (a full disk); None: raise OSError
    """

    def __init__(self, path: Path, resume_step: int = 0, on_failure: Callable[[str], None] | None = None) -> None:
        self._on_failure = on_failure
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        if path.exists():
            _drop_rows_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        self._write(step, {name: _json_number(value) for name, value in metrics.items()})

    def text(self, step: int, name: str, text: str) -> None:
        self._write(step, {name: text})

    def image(self, step: int, name: str, path: Path) -> None:
        self._write(step, {name: str(path)})

    def table(self, step: int, name: str, table: HeatMap) -> None:
        rows = ([_json_number(value) for value in row] for row in table.values)
        self._write(step, {name: dict(zip(table.rows, rows, strict=True))})

    def rewind(self, step: int) -> None:
        self._file.close()
        _drop_rows_after(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        try:
            self._file.close()  # writes what it still holds
        except OSError as error:
            self._report(error)

    def _write(self, step: int, row: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            self._report(error)

    def _report(self, error: OSError) -> None:
        if self._on_failure is None:
            raise error
        self._on_failure(f"{self._path} cannot be written: {error}")


def _json_number(value: float) -> float | str:
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _drop_rows_after(path: Path, step: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (found := _step_of(line)) is not None and found <= step]
    if kept != lines:
        aside = path.with_name(path.name + ".new")
        with aside.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)


def _step_of(line: bytes) -> int | None:
    """The step of a line, None if the line is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


class ConsoleLogger:
    """The run in one line: on a terminal a bar that is redrawn in place, elsewhere a printed line now and then.

    total_steps   the step at which the run ends.
    interval      without a terminal, a line is printed at every multiple of it, and at the end.
    """

    def __init__(
        self,
        total_steps: int,
        interval: int = 10,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._interval = interval
        self._console = console or Console()
        self._clock = clock
        self._recent: deque[tuple[int, float]] = deque(maxlen=50)  # (step, time): the ETA follows the present speed
        self._latest: dict[str, float] = {}
        self._progress: Progress | None = None

    def log(self, step: int, metrics: Metrics) -> None:
        self._latest.update(metrics)
        if not self._recent or step > self._recent[-1][0]:
            self._recent.append((step, self._clock()))
        line = status_line(step, self._total_steps, self._latest, self._seconds_left(step))
        if self._console.is_terminal:
            self._redraw(step, line)
        elif step % self._interval == 0 or step == self._total_steps or "val/loss" in metrics:
            self._print(line)

    def text(self, step: int, name: str, text: str) -> None:
        self._print(f"{name} at step {step}:\n{printable(text)}")

    def image(self, step: int, name: str, path: Path) -> None:
        self._print(f"{name} at step {step}: {path}")

    def table(self, step: int, name: str, table: HeatMap) -> None:
        """Too large for a terminal; `metrics.jsonl` has it."""

    def rewind(self, step: int) -> None:
        self._recent.clear()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _redraw(self, step: int, line: str) -> None:
        if self._progress is None:
            text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
            self._progress = Progress(BarColumn(16), text, console=self._console, auto_refresh=False)
            self._progress.add_task("", total=self._total_steps)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=step, description=line, refresh=True)

    def _seconds_left(self, step: int) -> float | None:
        (first_step, first_time), (last_step, last_time) = self._recent[0], self._recent[-1]
        if last_step == first_step:
            return None
        return (self._total_steps - step) * (last_time - first_time) / (last_step - first_step)


_COLUMNS = (  # metric, label, format
    ("train/loss", "loss", ".4f"),
    ("val/loss", "val", ".4f"),
    ("train/tokens_per_second", "tok/s", ",.0f"),
    ("train/grad_norm", "norm", ".3f"),
    ("balance/max_vio", "MaxVio", ".3f"),
)


def status_line(step: int, total_steps: int, metrics: Metrics, seconds_left: float | None) -> str:
    """`120/400  loss 2.1042  tok/s 8,120  norm 0.912  MaxVio 0.310  ETA 0:02:31`, with the metrics that are there."""
    parts = [f"{step:>{len(str(total_steps))}}/{total_steps}"]
    parts += [f"{label} {float(metrics[name]):{form}}" for name, label, form in _COLUMNS if name in metrics]
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        parts.append(f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}")
    return "  ".join(parts)


WandbMode = Literal["offline", "online"]


class WandbLogger:
    """Weights & Biases. Offline it writes to `run_dir/wandb/` and needs no key and no network.

    A resumed run passes the same run_id: online the run goes on; offline a second folder with that id is written,
    and `wandb sync` joins them. Online without a key, or without an answer within `patience_s`, falls back to
    offline: nothing is ever asked on the terminal. What W&B cannot do is warned about once, and the run goes on.
    """

    def __init__(
        self,
        run_dir: Path,
        run_id: str,
        project: str,
        name: str | None = None,
        mode: WandbMode = "offline",
        config: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        group: str | None = None,
        artifacts: bool = False,
        patience_s: float = 30.0,
    ) -> None:
        if mode not in ("offline", "online"):
            raise ValueError(f"logger.mode={mode} is unknown; use logger.mode=offline or online, or logger=none")
        self._run: Any = None
        self._warned: set[str] = set()
        self.run_path: Path | None = None  # the local folder, to give to `wandb sync`
        self._artifacts = artifacts
        settings = {"project": project, "name": name, "group": group, "config": dict(config or {}), "tags": list(tags)}
        if not os.environ.get("WANDB_SWEEP_ID"):  # the agent of a sweep has chosen the id
            settings["id"] = run_id
        attempts: tuple[WandbMode, ...] = ("online", "offline") if mode == "online" else ("offline",)
        for attempt in attempts:
            if self._run is None:
                self._attempt(f"start {attempt}", partial(self._start, run_dir, attempt, patience_s, settings))

    def log(self, step: int, metrics: Metrics) -> None:
        self._send(step, lambda wandb: {name: float(value) for name, value in metrics.items()})

    def text(self, step: int, name: str, text: str) -> None:
        self._send(step, lambda wandb: {name: wandb.Html(f"<pre>{html.escape(printable(text))}</pre>")})

    def image(self, step: int, name: str, path: Path) -> None:
        self._send(step, lambda wandb: {name: wandb.Image(str(path))})

    def table(self, step: int, name: str, table: HeatMap) -> None:
        caption = f"rows: {', '.join(table.rows)}"
        self._send(step, lambda wandb: {name: wandb.Image(table.image(), caption=caption)})

    def close(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            self._attempt("finish", run.finish)

    def rewind(self, step: int) -> None:
        """W&B cannot forget: it keeps what it has of the later steps, and takes new points when they are passed."""

    def checkpoint(self, name: str, path: Path) -> None:
        """Keep a checkpoint as an artifact of the run, if that was asked for."""

        def send() -> None:
            import wandb

            artifact = wandb.Artifact(name, type="checkpoint")
            artifact.add_dir(str(path))
            self._run.log_artifact(artifact)

        if self._artifacts and self._run is not None:
            self._attempt("log the checkpoint", send)

    def _start(self, run_dir: Path, mode: WandbMode, patience_s: float, settings: dict[str, Any]) -> None:
        import wandb  # here, because it is slow to import and only one process of a run needs it

        quiet = wandb.Settings(silent=True, console="off", init_timeout=patience_s, finish_timeout=patience_s)
        if mode == "online":
            wandb.setup(quiet)
            if not wandb.login(prompt=False, verify=False):
                raise RuntimeError("no API key found; set WANDB_API_KEY or run `wandb login`")
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(dir=str(run_dir), mode=mode, resume="allow", settings=quiet, **settings)
        except Exception:
            wandb.teardown()  # its service would hold on to the run id
            raise
        self.run_path = Path(self._run.dir).parent

    def _send(self, step: int, build: Callable[[Any], dict[str, Any]]) -> None:
        def send() -> None:
            import wandb

            self._run.log(build(wandb), step=step)

        if self._run is not None:
            self._attempt("log something", send)

    def _attempt(self, what: str, action: Callable[[], object]) -> None:
        """Do it, or warn, once. Whatever goes wrong in W&B, a missing package even, is no reason to end a run."""
        try:
            action()
        except Exception as error:
            if what not in self._warned:
                self._warned.add(what)
                reason = f"{type(error).__name__}: {error}"
                message = f"W&B could not {what} ({reason}); the run goes on, metrics.jsonl has all"
                warnings.warn(message, RuntimeWarning, stacklevel=3)
