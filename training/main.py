"""From a composed configuration to an exit code: prepare, train, report, and say clearly what went wrong.

A wrong configuration ends before anything is started, with one message from rank 0. A failure in the middle of
training names the rank, the step and, when a peer is lost, that peer. Failing ranks leave at once: waiting for a
dead peer's cooperation in a clean shutdown is how jobs hang.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from parallel.rank_table import crossing, rank_table
from parallel.saved import CheckpointError, checkpoint_path, list_checkpoints
from training.config import Config
from training.curve import draw_curve
from training.guard import Diverged
from training.outcome import BAD_CONFIG, FAILED, STOPPED, end_on_purpose, launched_by_script
from training.run_logging import show_plan
from training.stop import RunStopped, Stop, StopRequest, ignore_signals, stop_on_signals
from training.trainer import Job, Trainer, join_process_group, prepare


def run(config: Config) -> int:
    """Run the whole job in this process; returns the exit code."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config.dry_run:
        return _dry_run(config, rank)
    stop = StopRequest()
    stop_on_signals(stop)
    try:
        job = prepare(config, world)
    except (ValueError, CheckpointError, OSError) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return end_on_purpose(BAD_CONFIG)
    except Exception:
        print(f"[rank {rank}] failed while preparing:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return FAILED
    trainer: Trainer | None = None
    try:
        ranks = _announce_ranks(job) if rank == 0 else ""
        trainer = Trainer(job, join_process_group(job), stop)
        if rank == 0 and trainer.step == 0 and config.logger.name != "none":  # drawing takes a second
            show_plan(trainer.logger, job.run_dir, ranks, job.schedule)
        code = _train(job, trainer)
        ignore_signals()
        trainer.close()
        _leave_together()
    except Exception:
        where = f"in step {trainer.step + 1}" if trainer is not None else "while starting"
        _die(f"[rank {rank}] failed {where}:\n{traceback.format_exc()}", job)
    return code


def _dry_run(config: Config, rank: int) -> int:
    """Under torchrun its processes are the world, and one of them is enough to build it on paper."""
    from training.forecast import dry_run  # fake process groups are of no use to any other run

    least = config.parallel.pp * config.parallel.ep
    world = config.launch.processes or int(os.environ.get("WORLD_SIZE", least))
    return end_on_purpose(dry_run(config, world)) if rank == 0 else 0


def _train(job: Job, trainer: Trainer) -> int:
    """To the last step, or as far as somebody lets us. Returns the exit code."""
    try:
        val_loss = trainer.fit()
    except RunStopped as stopped:
        if trainer.mesh.rank == 0:
            _say_stopped(job, trainer, stopped.stop)
        return end_on_purpose(FAILED) if stopped.stop.failed else end_on_purpose(0, STOPPED)
    except CheckpointError as error:  # alike on all ranks
        if trainer.mesh.rank == 0:
            _say_stopped(job, trainer, Stop(str(error), failed=True))
        return end_on_purpose(FAILED)
    except Diverged as diverged:
        if trainer.mesh.rank == 0:
            trainer.logger.close()
            print(f"error: {diverged}", file=sys.stderr, flush=True)
        return end_on_purpose(FAILED)
    sample = trainer.sample(job.config.sample_tokens)
    if trainer.mesh.rank == 0:
        _report(job, trainer, val_loss, sample)
    return 0


def _announce_ranks(job: Job) -> str:
    """Print where the ranks sit, with a warning if that is a slow place for them; returns the table."""
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", job.layout.world))
    warning = crossing(job.layout, ranks_per_node).warning
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    table = rank_table(job.layout, job.schedule, ranks_per_node)
    print(table, flush=True)
    return table


def _report(job: Job, trainer: Trainer, val_loss: float, sample: str) -> None:
    """What a user wants to know at the end, and the command to go on."""
    config = job.config
    path = checkpoint_path(job.checkpoints, trainer.step)
    metrics, picture = job.run_dir / "metrics.jsonl", job.run_dir / "curve.png"
    draw_curve(
        metrics, picture, f"{config.run}: {config.schedule.name}, PP {config.parallel.pp}, EP {config.parallel.ep}"
    )
    trainer.logger.image(trainer.step, "curve", picture)
    if sample:
        trainer.logger.text(trainer.step, "sample", sample)
    if trainer.wandb is not None:
        trainer.wandb.checkpoint(config.run, path)
    trainer.logger.close()
    print(f"validation loss  {val_loss:.4f} nats per byte (uniform guessing: 5.55)")
    print(f"checkpoint       {path}")
    print(f"metrics          {metrics}")
    wandb_run = f"off (logger={config.logger.name})" if trainer.wandb is None else trainer.wandb.run_path
    print(f"W&B run          {wandb_run}")
    print(f"resume           {resume_command(job)}", flush=True)


def resume_command(job: Job) -> str:
    """The command line that goes on with this run for as many steps again."""
    kept = [a for a in sys.argv[1:] if not a.startswith(("steps=", "run=", "resume="))]
    words = [f"run={job.config.run}", f"steps={2 * job.config.steps}", *kept]
    if launched_by_script():
        return shlex.join(["launch/torchrun.sh", *words])
    processes = os.environ.get("LOCAL_WORLD_SIZE", 1)
    return shlex.join([_torchrun(), f"--nproc-per-node={processes}", Path(sys.argv[0]).name, *words])


def _torchrun() -> str:
    """The torchrun of this Python, as one would type it here: it need not be on the shell's path."""
    ours = Path(sys.executable).with_name("torchrun")
    if not ours.exists():
        return "torchrun"
    return str(ours.relative_to(Path.cwd())) if ours.is_relative_to(Path.cwd()) else str(ours)


def _say_stopped(job: Job, trainer: Trainer, stop: Stop) -> None:
    """All ranks have agreed to end early: why, and how to go on."""
    trainer.logger.close()
    print(f"stopped after step {trainer.step} ({stop.reason}). {_way_on(job)}", file=sys.stderr, flush=True)


def _way_on(job: Job) -> str:
    newest = list_checkpoints(job.checkpoints)[-1:]
    if not newest:
        return f"There is no checkpoint in {job.checkpoints} yet; the same command starts afresh."
    return f"The newest checkpoint in {job.checkpoints} is whole; the same command goes on from it ({newest[0].name})."


def _leave_together() -> None:
    """Wait for rank 0's report, then close the process group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _die(message: str, job: Job) -> NoReturn:
    print(f"{message}\n{_way_on(job)}", file=sys.stderr, flush=True)
    os._exit(FAILED)
