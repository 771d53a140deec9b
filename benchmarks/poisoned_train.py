"""train.py with a fault: in its step number POISON_STEP a gradient on rank 1 is NaN (for benchmarks/faults.py)."""

from __future__ import annotations

import math
import os
import runpy
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from training import step

_honest = step.reduce_gradients
_steps = count(1)


def _poisoned(buckets: Sequence[Any], *rest: Any, **named: Any) -> Any:
    if next(_steps) == int(os.environ["POISON_STEP"]) and os.environ["RANK"] == "1":
        buckets[0].grads[0] = math.nan
    return _honest(buckets, *rest, **named)


step.reduce_gradients = _poisoned  # type: ignore[assignment]
runpy.run_path(str(Path(__file__).resolve().parent.parent / "train.py"), run_name="__main__")
