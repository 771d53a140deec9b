"""A run with everything on: gone on bit for bit past a damaged checkpoint, and under other layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.job import Job, losses, write_text

pytestmark = pytest.mark.slow

LOOP = (
    "save_every=4 eval_every=4 keep_last=3 sample_tokens=0 logger=none recipe=report recipe.token_scale=1e-9 "
    "schedule.micro_batches=8 recipe.batch_start=4 recipe.batch_increment=4 recipe.batch_tokens=0.5e12 "
    "model.mtp_depth=1"
)
SHARDED = f"{LOOP} optim.zero=1 precision=bf16 optim.moments=bf16 optim.ema=0.9 eval.ema=true"
PLAIN = f"{LOOP} optim.ema=0.9 eval.ema=true"
TOLERANCE = 2e-4  # between losses of layouts, relative: FP32 sums in another order, amplified by a few steps of Adam


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a little text, and undisturbed runs of twelve steps."""
    made = tmp_path_factory.mktemp("resume")
    write_text(made)
    finish(made, "sharded", f"{SHARDED} steps=12")
    finish(made, "plain", f"{PLAIN} steps=12")
    return made


def finish(folder: Path, run: str, overrides: str) -> str:
    with Job(folder, run, overrides) as job:
        job.finish()
        return job.output


def test_everything_on_and_a_damaged_newest_checkpoint(folder: Path) -> None:
    """Stopped after eight steps, the checkpoint of step 8 damaged: goes on from step 4, to the same end."""
    finish(folder, "damaged", f"{SHARDED} steps=8")
    newest = folder / "damaged" / "checkpoints" / "step_00000008"
    file = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    said = finish(folder, "damaged", f"{SHARDED} steps=12")
    assert f"checkpoint {newest} is corrupt: {file.name} does not have the contents that were saved" in said
    assert losses(folder / "damaged") == losses(folder / "sharded")
    assert "Warning" not in said, said


@pytest.mark.parametrize(
    "other", ["schedule=one_f_one_b", "parallel.pp=1 parallel.ep=2 schedule=one_f_one_b schedule.micro_batches=4",
              "optim.zero=1"]
)  # fmt: skip
def test_another_layout_goes_on_with_the_same_losses(folder: Path, other: str) -> None:
    run = f"to_{abs(hash(other))}"
    finish(folder, run, f"{PLAIN} steps=8")
    finish(folder, run, f"{PLAIN} steps=12 {other}")
    ours, whole = losses(folder / run), losses(folder / "plain")
    for name in ("train/loss", "val/loss"):
        assert ours[name].keys() == whole[name].keys()
        for step, value in whole[name].items():
            assert ours[name][step] == pytest.approx(value, rel=TOLERANCE), (name, step)
