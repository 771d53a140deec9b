"""`profile=on`: some steps under torch's profiler, and the pipeline's own record of them, in one file for Perfetto.

Each chosen rank profiles the same steps and writes what it saw into the run's folder; then rank 0 joins these files:
`profile/trace.json.gz`, to be opened in ui.perfetto.dev. It holds per rank torch's operators (and kernels on a GPU)
and below them the steps of the schedule, the waits for messages and the reductions of gradients, on one clock. On
several nodes that clock is as good as the nodes' own clocks agree.

The profiler slows a step down, so the times in a trace are not those of training.
"""

from __future__ import annotations

import gzip
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

from dualpipe.perfetto import to_perfetto
from dualpipe.timeline import Span, Timeline
from parallel.build import Replica
from parallel.mesh import Mesh
from parallel.update import Update

PIPELINE = "pipeline"  # the range under which training/step.py runs it
REDUCE = "gradients"  # a lane of the timeline
TIMELINE = "timeline"  # the process of the timeline, until it gets a number
TRACE = "trace.json.gz"


@dataclass
class ProfileConfig:
    enabled: bool = False
    ranks: list[int] = field(default_factory=list)  # [] = those of the first pipeline
    after: int = 3  # steps of this start before the first one that is profiled
    steps: int = 2  # that are profiled

    def check(self, world: int) -> None:
        """Raise ValueError, naming the override, for a window that cannot be."""
        for name, least in (("after", 0), ("steps", 1)):
            if not least <= getattr(self, name) <= 1_000_000:
                raise ValueError(f"profile.{name}={getattr(self, name)} must be between {least} and 1000000")
        for rank in self.ranks:
            if not 0 <= rank < world or self.ranks.count(rank) > 1:
                raise ValueError(
                    f"profile.ranks={self.ranks} must be different numbers of ranks, 0 to {world - 1}, or [] for those "
                    f"of the first pipeline"
                )


class StepProfiler:
    """Goes through the steps with the trainer, and profiles those in its window. The same on every rank."""

    def __init__(self, config: ProfileConfig, mesh: Mesh, folder: Path, device: torch.device) -> None:
        self._config, self._mesh, self._folder = config, mesh, folder
        self._ranks = config.ranks or mesh.layout.pipelines()[0]
        self._seen = 0
        self._over = not config.enabled
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profile: Any = None
        self._steps: list[tuple[Span, ...]] = []

    @contextmanager
    def step(self, replica: Replica, update: Update) -> Iterator[None]:
        """Around one training step; after the last one of the window the file is there. Collective then."""
        self._seen += 1
        if self._over or self._seen <= self._config.after:
            yield
            return
        if self._mesh.rank not in self._ranks:
            yield
        else:
            if self._profile is None:
                self._profile = torch.profiler.profile(activities=self._activities)
                self._profile.start()
            before = replica.pipeline.record, update.record
            replica.pipeline.record = update.record = True
            try:
                yield
            finally:
                replica.pipeline.record, update.record = before
            self._steps.append((*replica.pipeline.spans, *_reductions(self._mesh.rank, update)))
        if self._seen == self._config.after + self._config.steps:
            self.close()

    def close(self) -> None:
        """Write what has been seen; collective."""
        if self._over or self._seen <= self._config.after:
            return
        self._over = True
        own = self._folder / f"rank_{self._mesh.rank}.json"
        if self._profile is not None:
            self._profile.stop()
            with _tolerated():
                self._folder.mkdir(parents=True, exist_ok=True)
                self._profile.export_chrome_trace(str(own))
                own.write_text(json.dumps(with_timeline(json.loads(own.read_text()), self._steps, self._mesh.rank)))
            self._profile = None
        if self._mesh.control is not None:
            dist.barrier(self._mesh.control)
        if self._mesh.rank == 0:
            with _tolerated():
                paths = [self._folder / f"rank_{rank}.json" for rank in self._ranks]
                join(paths, self._folder / TRACE)
                print(f"profile of {self._seen - self._config.after} steps: {self._folder / TRACE}", flush=True)


@contextmanager
def _tolerated() -> Iterator[None]:
    """Whatever goes wrong with a picture of training is no reason to end it."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"the profile could not be written ({error}); the run goes on", RuntimeWarning, stacklevel=3)


def _reductions(rank: int, update: Update) -> list[Span]:
    """The sums of gradients of the last step, on the host's clock."""
    offset = time.time() - time.perf_counter()
    return [Span(rank, REDUCE, label, offset + start, offset + end) for label, start, _, end in update.spans]


def with_timeline(trace: dict[str, Any], steps: Sequence[Sequence[Span]], rank: int) -> dict[str, Any]:
    """The profiler's trace of a rank on the world's clock, with its spans of every step as a process beside it.

    A step's spans begin with the range `pipeline`: on a GPU, where the device began with it.
    """
    base = trace.pop("baseTimeNanoseconds", 0) / 1e3
    events = trace["traceEvents"]
    for event in events:
        event["ts"] = event.get("ts", 0.0) + base
    ranges = [event for event in events if event["name"] == PIPELINE and event["ph"] == "X"]
    on_device = [event["ts"] for event in ranges if event.get("cat") == "gpu_user_annotation"]
    on_host = [event["ts"] for event in ranges if event.get("cat") == "user_annotation"]
    begins = sorted(on_device if len(on_device) == len(steps) else on_host)
    spans: list[Span] = []
    for begin, step in zip(begins, steps, strict=True):
        for span in step:
            origin = 0.0 if span.lane == REDUCE else begin / 1e6
            spans.append(Span(0, span.lane, span.label, origin + span.start, origin + span.end))
    timeline = Timeline("", 1, tuple(spans))
    for event in json.loads(to_perfetto([timeline], 1e6))["traceEvents"]:
        events.append({**event, "ts": event.get("ts", 0.0) + timeline.start * 1e6, "pid": TIMELINE})
    return {**trace, "rank": rank}


def join(paths: Sequence[Path], out: Path) -> None:
    """One trace of those of several ranks, whose files go. Time starts at 0, and every process says its rank."""
    traces = [json.loads(path.read_text()) for path in paths]
    first = min(event["ts"] for trace in traces for event in trace["traceEvents"] if event["ph"] != "M")
    events: list[dict[str, Any]] = []
    numbers: dict[tuple[int, Any], int] = {}
    for trace in traces:
        rank = trace["rank"]
        for event in trace["traceEvents"]:
            process = event["pid"]
            event["pid"] = numbers.setdefault((rank, process), len(numbers))
            event["ts"] = max(0.0, event["ts"] - first)
            if "id" in event:  # of arrows between events
                event["id"] = f"{rank}.{event['id']}"
            if event["name"] == "process_name":
                event["args"] = {"name": f"rank {rank}: {PIPELINE if process == TIMELINE else event['args']['name']}"}
            elif event["name"] == "process_sort_index":
                event["args"] = {"sort_index": event["pid"]}
            events.append(event)
    with gzip.open(out, "wt", encoding="utf-8") as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)
    for path in paths:
        path.unlink()
