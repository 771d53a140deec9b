"""Many runs from one command: `python train.py --multirun optim.lr=1e-3,3e-3 run=lr`.

Hydra composes one job per combination. Each gets a torchrun of its own, one after the other, because processes that
share a rendezvous cannot be reused; its run is called `<run>.<number of the job>`. A job that fails does not keep the
others from running; Hydra reports it at the end. The result of a job is its final validation loss, so that Hydra's
optimising sweepers (Optuna, Ax, ...) have something to minimise.

The number of processes is `launch.processes`, or else one pipeline with its expert group: PP · EP.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from training.config import Config
from training.curve import read_metric


class JobFailed(RuntimeError):
    """A job of a sweep ended with an error, which it has printed itself."""


def job_command(script: str, config: Config, overrides: Sequence[str], number: int) -> list[str]:
    """The command of one job of a sweep."""
    processes = config.launch.processes or config.parallel.pp * config.parallel.ep
    kept = [word for word in overrides if not word.startswith("run=")]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
        *(script, f"run={config.run}.{number}", *kept),
    ]


def run_job(script: str, config: Config, overrides: Sequence[str], number: int) -> float:
    """Run one job to its end; returns its final validation loss. Raises JobFailed."""
    run = f"{config.run}.{number}"
    print(f"job {number}: run={run} {' '.join(overrides)}", flush=True)
    command = job_command(script, config, overrides, number)
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}  # set by train.py
    code = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **environment}).returncode
    if code:
        raise JobFailed(f"job {number} (run={run}) ended with exit code {code}")
    _, losses = read_metric(Path(config.runs_dir) / run / "metrics.jsonl", "val/loss")
    if not losses:
        raise JobFailed(f"job {number} (run={run}) ended early, before its first validation")
    return losses[-1]
