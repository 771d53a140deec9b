"""train.py with a fault: in its step number POISON_STEP a gradient on rank 1 is NaN (for benchmarks/faults.py).

POISON=before: before it is summed over the copies; after: in the sum, in a part whose norm another rank measures.
"""

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
    name = "stage_done" if os.environ["POISON"] == "before" else "finish_reduction"
    honest = getattr(update, name)

    def poison(*stage: Any) -> None:
        if not stage:
            honest()
        for bucket in replica.buckets:
            bucket.grads[0] = math.nan
        if stage:
            honest(*stage)

    setattr(update, name, poison)
    try:
        return train_step(replica, update, *rest)
    finally:
        setattr(update, name, honest)


trainer.train_step = poisoned_step  # type: ignore[assignment]
runpy.run_path(str(Path(__file__).resolve().parent.parent / "train.py"), run_name="__main__")
