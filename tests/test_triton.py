"""The Triton kernels against the reference backend, on a CPU: see triton_interpreted.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux only")
def test_every_kernel_computes_what_the_reference_computes() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "tests/triton_interpreted.py"],
        cwd=Path(__file__).parent.parent, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout
