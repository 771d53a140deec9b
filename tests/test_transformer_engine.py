"""Our use of NVIDIA's Transformer Engine, on a CPU: see transformer_engine_calls.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.fp8.precision import Fp8Precision
from model.fp8.transformer_engine import pad_rows
from model.precisions import PrecisionConfig, make_precision


def test_every_call_fits_the_library() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "tests/transformer_engine_calls.py"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_message_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"--no-build-isolation -e '\.\[gpu\]'.*or use precision\.backend=triton"):
        make_precision(PrecisionConfig("fp8", backend="transformer_engine"))


@pytest.mark.parametrize("backend", ["triton", "transformer_engine"])
def test_on_paper_no_gpu_is_needed(backend: str) -> None:
    config = PrecisionConfig("fp8", backend=backend, formats={"head": "fp8"})
    precision, _ = make_precision(config, here=False)
    assert isinstance(precision, Fp8Precision)
    other = backend == "transformer_engine"
    formats = [precision.formats[module] for module in ("head", "attention_output", "swiglu", "router")]
    assert formats == (["fp8_pow2", "fp8_pow2", "bf16", "fp32"] if other else ["fp8", "fp8_e5m6", "fp8", "fp32"])
    with pytest.raises(ValueError, match="unknown module"):
        make_precision(PrecisionConfig("fp8", backend=backend, formats={"hat": "fp8"}), here=False)


@pytest.mark.parametrize(
    ("counts", "sizes", "rows"),
    [
        ([16, 32], [16, 32], None),
        ([1, 0, 17], [16, 0, 32], [0, *range(16, 33)]),
        ([0, 0], [16, 0], []),
        ([5], [16], list(range(5))),
    ],
)
def test_padding(counts: list[int], sizes: list[int], rows: list[int] | None) -> None:
    x = torch.randn(sum(counts), 3)
    padded, found_sizes, found_rows = pad_rows(x, counts)
    assert found_sizes == sizes and len(padded) == sum(sizes)
    assert (None if found_rows is None else found_rows.tolist()) == rows
    assert torch.equal(padded if rows is None else padded[rows], x)
    assert int((padded != 0).any(1).sum()) == len(x)
