"""Imported once by the fork server (tests/spawn.py), so that test processes start with these modules loaded."""

import training.step  # noqa: F401
