"""`trace=true`: what the pipeline did when, one step in every `trace_every`; measured above predicted.

Rank 0 gathers the spans of the first pipeline's ranks and logs how much of their time was idle, beside what the
schedule promises at the very costs of that step: what is left between the two is messages, waiting for a slower rank,
and the runtime itself. In `runs/<run>/trace/` there is a picture of each such step, and a trace for ui.perfetto.dev.

Times count from the beginning of the step on each rank. All ranks have just counted their targets together, so they
begin within a fraction of a millisecond on one machine, and no clocks need to agree.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from dualpipe.measured import costs_of
from dualpipe.perfetto import to_perfetto
from dualpipe.plot import save_plot
from dualpipe.schedule import Schedule
from dualpipe.simulator import simulate
from dualpipe.timeline import Span, Timeline
from parallel.build import Replica
from parallel.mesh import Mesh
from training.loggers import RunLogger

DRAWABLE = 1200  # steps of a schedule; larger ones make a picture of stripes


class Trace:
    """Records one step in `every`; 0 records none. Collective: all ranks call `begin` and `end` for the same steps."""

    def __init__(self, every: int, mesh: Mesh, folder: Path) -> None:
        self._every, self._mesh, self._folder = every, mesh, folder

    def wants(self, step: int) -> bool:
        """The first step is never recorded: it warms up."""
        return self._every > 0 and step % self._every == 0 and step > 1

    def begin(self, step: int, replica: Replica) -> None:
        replica.pipeline.record = self.wants(step)

    def end(self, step: int, replica: Replica, logger: RunLogger) -> dict[str, float]:
        """After the step: its metrics, on rank 0; the picture goes to the logger and the folder."""
        if not self.wants(step):
            return {}
        spans = self._gather(replica.pipeline.spans)
        if self._mesh.rank:
            return {}
        measured, predicted = timelines(spans, replica.schedule, f"{replica.schedule.name}, step {step}")
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{step:08d}.json"
        path.write_text(to_perfetto([measured, predicted], microseconds=1e6), encoding="utf-8")
        if sum(map(len, replica.schedule.steps)) <= DRAWABLE:
            save_plot([measured, predicted], path.with_suffix(".png"))
            logger.image(step, "trace", path.with_suffix(".png"))
        return {
            "trace/bubble": measured.bubble,
            "trace/bubble_predicted": predicted.bubble,
            "trace/seconds": measured.makespan,
            "trace/seconds_predicted": predicted.makespan,
        }

    def _gather(self, spans: list[Span]) -> list[Span]:
        """The spans of all ranks of data-parallel place 0, on rank 0."""
        mine = spans if self._mesh.dp == 0 else []
        if self._mesh.control is None:
            return mine
        found: list[list[Span]] = [[] for _ in range(self._mesh.layout.world)]
        dist.gather_object(mine, found if self._mesh.rank == 0 else None, dst=0, group=self._mesh.control)
        return [span for part in found for span in part]


def timelines(spans: list[Span], schedule: Schedule, name: str) -> tuple[Timeline, Timeline]:
    """Measured, and predicted at the costs that were measured."""
    measured = Timeline(f"{name}, measured", schedule.num_ranks, tuple(spans))
    costs = costs_of(measured, schedule.num_stages)
    simulated = simulate(schedule, costs)
    return measured, Timeline(f"{name}, predicted", schedule.num_ranks, simulated.spans)
