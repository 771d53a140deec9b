"""Damaged checkpoints: found, named, and passed over; old ones go, those to keep stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from parallel.fragments import Fragment
from parallel.integrity import COMPLETE
from parallel.mesh import Layout, Mesh
from parallel.saved import CheckpointError, RunState, all_checkpoints, list_checkpoints
from training.checkpoint import verify_contents
from training.checkpoint_writer import CheckpointWriter
from training.inspect_checkpoint import main
from training.resume import newest_sound

ALONE = Mesh(Layout(1, 1, 1), 0, None, None, None, None, None)


def state(step: int) -> RunState:
    return RunState(step, step * 4, step * 40, step, {}, "id", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints of one tensor."""
    writer = CheckpointWriter(tmp_path, ALONE, keep_last=3)
    for step in (1, 2, 3):
        writer.save(state(step), [Fragment("w", (2, 3), 0, torch.full((6,), float(step)))])
    writer.close()
    return tmp_path


def data_file(path: Path) -> Path:
    (file,) = path.glob("*.distcp")
    return file


def test_a_flipped_byte_is_found_and_the_file_named(folder: Path) -> None:
    newest = list_checkpoints(folder)[-1]
    file = data_file(newest)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{newest} is corrupt: {file.name} does not have the contents"):
        verify_contents(newest, ALONE)
    verify_contents(list_checkpoints(folder)[0], ALONE)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: (p / COMPLETE).unlink(), "no COMPLETE marker"),
        (lambda p: data_file(p).write_bytes(b"short"), "has 5 bytes; it was saved with"),
        (lambda p: data_file(p).unlink(), "is missing"),
        (lambda p: (p / "checksums.json").write_text("{}"), "checksums.json is not the one"),
    ],
)
def test_a_damaged_newest_one_is_skipped_with_its_name(
    folder: Path, damage: object, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = list_checkpoints(folder)[-1]
    damage(newest)  # type: ignore[operator]
    assert newest_sound(all_checkpoints(folder)).name == "step_00000002"
    said = capsys.readouterr().err
    assert str(newest) in said and reason in said
    assert [p.name for p in list_checkpoints(folder)] == ["step_00000001", "step_00000002"]


def test_none_sound_is_an_error(folder: Path) -> None:
    for path in all_checkpoints(folder):
        (path / COMPLETE).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used"):
        newest_sound(all_checkpoints(folder))


def test_keep_last_and_keep_every(tmp_path: Path) -> None:
    (tmp_path / ".writing_step_00000099").mkdir()
    writer = CheckpointWriter(tmp_path, ALONE, keep_last=2, keep_every=4)
    for step in range(1, 12):
        writer.save(state(step), [Fragment("w", (1,), 0, torch.ones(1))])
    writer.close()
    assert [int(p.name[5:]) for p in list_checkpoints(tmp_path)] == [4, 8, 10, 11]
    assert not list(tmp_path.glob(".writing_*"))


def test_what_was_saved_is_what_was_there_when_save_returned(tmp_path: Path) -> None:
    """Training goes on at once and overwrites its tensors."""
    from parallel.fragments import load_fragments

    values = torch.arange(1e6)
    writer = CheckpointWriter(tmp_path, ALONE, keep_last=1)
    writer.save(state(1), [Fragment("w", (1000, 1000), 0, values)])
    values.zero_()
    writer.close()
    back = torch.zeros(1_000_000)
    load_fragments(list_checkpoints(tmp_path)[0], [Fragment("w", (1000, 1000), 0, back)], None)
    assert torch.equal(back, torch.arange(1e6))


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([(0, 4)], "w: elements from 4 to 6 would be saved never"),
        ([(0, 2), (4, 2)], "w: elements from 2 would be saved never"),
        ([(0, 4), (2, 4)], "w: elements from 2 would be saved twice"),
    ],
)
def test_every_element_is_saved_once(tmp_path: Path, pieces: list[tuple[int, int]], message: str) -> None:
    writer = CheckpointWriter(tmp_path, ALONE, keep_last=1)
    writer.save(state(1), [Fragment("w", (6,), start, torch.ones(length)) for start, length in pieces])
    with pytest.raises(CheckpointError, match=message):
        writer.close()
    assert all_checkpoints(tmp_path) == []


def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--tensors"]) == 0
    said = capsys.readouterr().out
    assert "step         3 (3 updates, 12 samples, 120 tokens)" in said
    assert "w  (2, 3)" in said and "checksums match" in said
    file = data_file(list_checkpoints(folder)[-1])
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert main(["inspect", str(list_checkpoints(folder)[-1])]) == 1
    assert file.name in capsys.readouterr().out
    assert json.loads((list_checkpoints(folder)[0] / "run.json").read_text())["step"] == 1
