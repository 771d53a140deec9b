"""The loggers of one run, as the configuration asks for them, and what they show before the first step."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dualpipe.costs import uniform
from dualpipe.plot import save_plot
from dualpipe.schedule import Schedule
from dualpipe.simulator import simulate
from training.config import Config, to_dict
from training.loggers import CompositeLogger, ConsoleLogger, JsonlLogger, RunLogger, WandbLogger
from training.tensorboard import TensorBoardLogger

DRAWABLE = 600  # steps of a schedule; larger ones make a picture of stripes
ROOT = Path(__file__).parent.parent


def make_logger(
    config: Config, run_dir: Path, step: int, wandb_id: str, on_failure: Callable[[str], None]
) -> tuple[CompositeLogger, WandbLogger | None]:
    """All loggers of a run that goes on from `step`, and the one for W&B among them (None without).

    on_failure   told why, when the metrics cannot be written any more
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    loggers: list[RunLogger] = [
        JsonlLogger(run_dir / "metrics.jsonl", step, on_failure),
        ConsoleLogger(config.steps, config.log_every),
    ]
    names = config.logger.name
    if "tensorboard" in names:
        loggers.append(TensorBoardLogger(run_dir, step))
    if "wandb" not in names:
        return CompositeLogger(loggers), None
    wandb = WandbLogger(
        run_dir,
        wandb_id,
        config.logger.project,
        name=config.run,
        mode="online" if config.logger.mode == "online" else "offline",
        config={**to_dict(config), "code_version": code_version()},
        tags=config.logger.tags,
        group=config.logger.group,
        artifacts=config.logger.artifacts,
    )
    return CompositeLogger([*loggers, wandb]), wandb


def show_plan(logger: RunLogger, run_dir: Path, ranks: str, schedule: Schedule) -> None:
    """Log where the ranks sit, and a picture of the schedule at the costs for which its bubble is published."""
    logger.text(0, "ranks", ranks)
    if sum(map(len, schedule.steps)) <= DRAWABLE:
        picture = run_dir / "schedule.png"
        save_plot([simulate(schedule, uniform(schedule.num_stages))], picture)
        logger.image(0, "schedule", picture)


def code_version() -> str:
    """`git describe` of this source tree, marked if it has changes; "unknown" outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        done: Any = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
