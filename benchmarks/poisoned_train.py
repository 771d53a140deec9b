"""train.py with a fault: in its step number POISON_STEP a gradient on rank 1 is NaN (for benchmarks/faults.py)."""

from __future__ import annotations

import math
import os
import runpy
from itertools import count
from pathlib import Path
from typing import Any

from parallel.build import Replica
from parallel.update import Update
from training import trainer
from training.step import StepResult, train_step

steps = count(1)


def poisoned_step(replica: Replica, update: Update, *rest: Any) -> StepResult:
    if next(steps) != int(os.environ["POISON_STEP"]) or os.environ["RANK"] != "1":
        return train_step(replica, update, *rest)
    honest = update.stage_done

    def poison(*stage: Any) -> None:
        for bucket in replica.buckets:
            bucket.grads[0] = math.nan
        honest(*stage)

    update.stage_done = poison  # type: ignore[method-assign]
    try:
        return train_step(replica, update, *rest)
    finally:
        update.stage_done = honest  # type: ignore[method-assign]


trainer.train_step = poisoned_step  # type: ignore[assignment]
runpy.run_path(str(Path(__file__).resolve().parent.parent / "train.py"), run_name="__main__")
