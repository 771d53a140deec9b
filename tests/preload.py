"""Imported once by the fork server (tests/spawn.py), so that test processes start with these modules loaded.

What a process would otherwise import only when it gets there is named as well: torch._dynamo, as long an import as
torch itself, comes with the first optimizer that torch makes, and pyplot with a run's curve.
"""

import matplotlib.pyplot  # noqa: F401
import torch._dynamo  # noqa: F401

import training.main  # noqa: F401
