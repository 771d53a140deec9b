"""Balance in a whole run, in this process: what metrics.jsonl has, γ by tokens, windows and recorded loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from parallel.mesh import Mesh
from parallel.saved import list_checkpoints, read_run_state
from training.config import Config
from training.recipe import Piece
from training.stop import StopRequest
from training.trainer import Trainer, join_process_group, prepare

NUMBERS = ("max_vio", "max_vio_global", "entropy", "bias_spread", "dead_experts", "nodes_per_token", "loss")
BATCH_TOKENS = 2 * 2 * 16


def configure(folder: Path, steps: int) -> Config:
    """Two layers of eight experts and one of multi-token prediction; batches of 64 tokens; evaluation every 3 steps."""
    (folder / "text").mkdir(exist_ok=True)
    (folder / "text" / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    config = Config(run="r", runs_dir=str(folder / "runs"), steps=steps, eval_every=3, save_every=4, eval_batches=2)
    config.model = ModelConfig(
        num_layers=3, num_dense_layers=1, hidden_size=16, dense_ffn_size=16, num_heads=2, query_rank=8,
        key_value_rank=8, head_dim=4, rope_dim=4, value_dim=4, num_experts=8, experts_per_token=2, expert_ffn_size=8,
        num_groups=4, groups_per_token=2, mtp_depth=1,
    )  # fmt: skip
    config.data.path, config.data.cache_dir = str(folder / "text"), str(folder / "cache")
    config.data.seq_len, config.data.micro_batch_size = 16, 2
    config.parallel.pp, config.schedule.name, config.schedule.micro_batches = 1, "one_f_one_b", 2
    config.logger.name, config.launch.threads = "none", 1
    config.balance.bias_rate, config.balance.sequence_loss = 0.25, 0.1
    config.balance.bias_rate_schedule = [
        Piece(2 * BATCH_TOKENS, 1.0),
        Piece(2 * BATCH_TOKENS, 1.0, 0.0),
        Piece(9e9, 0.0),
    ]
    return config


def train(config: Config) -> Trainer:
    job = prepare(config, 1)
    mesh: Mesh = join_process_group(job)
    trainer = Trainer(job, mesh, StopRequest())
    trainer.fit()
    trainer.logger.close()
    return trainer


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(configure(folder, steps=8))


def test_every_number_of_every_layer_in_training_and_validation(run: tuple[Path, Trainer]) -> None:
    rows = read_rows(run[0])
    training = {row["step"]: row for row in rows if "train/loss" in row}
    assert sorted(training) == list(range(1, 9))
    for row in training.values():
        for name in NUMBERS:
            layers = [row[f"balance/{name}/{layer}"] for layer in ("layers.1", "layers.2", "mtp.1.layer")]
            whole = {"loss": sum(layers), "entropy": sum(layers) / 3, "nodes_per_token": sum(layers) / 3}
            assert row[f"balance/{name}"] == pytest.approx(whole.get(name, max(layers)))
        assert 0.1 * 3 * 0.9 < row["balance/loss"] < 0.1 * 3 * 4  # α × layers × (1 if even)
        assert 1 <= row["balance/nodes_per_token"] <= 2
    validation = [row for row in rows if "val/loss" in row]
    assert [row["step"] for row in validation] == [3, 6, 8]
    for name in NUMBERS:
        assert f"val_balance/{name}/layers.2" in validation[-1]
        assert f"val_balance/{name}/mtp.1.layer" not in validation[-1], "validation does without MTP"


def test_tables_hold_every_token_once(run: tuple[Path, Trainer]) -> None:
    tables = {row["step"]: row["balance/load"] for row in read_rows(run[0]) if "balance/load" in row}
    for step, batches in ((3, 3), (6, 3), (8, 2)):
        assert list(tables[step]) == ["layers.1", "layers.2", "mtp.1.layer"]
        for loads in tables[step].values():
            assert sum(loads) == batches * BATCH_TOKENS * 2, "two experts per token, each step in one window"
    share = next(row["balance/node_share"] for row in read_rows(run[0]) if "balance/node_share" in row)
    assert all(len(row) == 4 and 1 <= sum(row) <= 2 for row in share.values())
    val = next(row["val_balance/load"] for row in read_rows(run[0]) if "val_balance/load" in row)
    assert sum(val["layers.1"]) == 2 * BATCH_TOKENS * 2


def test_gamma_follows_its_schedule_in_tokens(run: tuple[Path, Trainer]) -> None:
    """γ 0.25 for two steps, then down to 0 over two more: biases are multiples of what was added, then stay."""
    rows = {row["step"]: row for row in read_rows(run[0]) if "train/loss" in row}
    assert [rows[s]["balance/bias_rate"] for s in range(1, 9)] == [0.25, 0.25, 0.25, 0.125, 0, 0, 0, 0]
    assert rows[1]["balance/bias_spread"] == 0.5
    assert rows[8]["balance/bias_spread/layers.1"] == rows[4]["balance/bias_spread/layers.1"] > 0


def test_the_window_survives_an_interruption(run: tuple[Path, Trainer], tmp_path: Path) -> None:
    """Stopped after 4 steps, in the middle of a window; the whole run's numbers and its recorded loads come out."""
    first = configure(tmp_path, steps=4)
    train(first)
    recorded = read_run_state(list_checkpoints(tmp_path / "runs" / "r" / "checkpoints")[-1]).expert_loads
    assert sum(recorded["layers.1"][:8]) == BATCH_TOKENS * 2, "step 4 alone: the window opened after the evaluation"
    again = configure(tmp_path, steps=8)
    trainer = train(again)
    assert trainer.balance.recorded() == run[1].balance.recorded()
    whole, resumed = ({r["step"]: r for r in read_rows(f) if "train/loss" in r} for f in (run[0], tmp_path))
    for name in ("max_vio", "max_vio_global", "dead_experts", "bias_spread"):
        assert [resumed[s][f"balance/{name}"] for s in (5, 6, 7, 8)] == [
            whole[s][f"balance/{name}"] for s in (5, 6, 7, 8)
        ], name


def test_forced_routing_in_a_run(tmp_path: Path) -> None:
    config = configure(tmp_path, steps=1)
    config.balance.force = "uniform"
    train(config)
    row = next(row for row in read_rows(tmp_path) if "train/loss" in row)
    assert row["balance/max_vio"] == 0 and row["balance/nodes_per_token"] == 2
    assert row["balance/bias_spread"] == 0
