"""The recipe of a run: the report's schedules, a growing batch, the average of the weights, BF16 moments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from dualpipe.schedules import make_schedule
from model.config import ModelConfig
from model.precisions import make_precision
from parallel.buckets import GradBucket
from parallel.build import BuildOptions, build_replica
from parallel.mesh import Layout, Mesh
from parallel.update import ReplicatedUpdate, Update
from training.adamw import AdamW, LowPrecisionAdamW, round_stochastically
from training.config import Config, from_hydra, register_schemas
from training.ema import WeightAverage
from training.muon import orthogonalise
from training.optimizer import OptimConfig, make_flat, make_update
from training.recipe import Piece, RecipeConfig, batch_at, check_ramp, factor_at, value_at
from training.validate import validate

ROOT = Path(__file__).parent.parent


def configure(*overrides: str) -> Config:
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return from_hydra(compose("config", list(overrides)))


def test_the_reports_learning_rate() -> None:
    """Report 4.2: warm-up, 2.2e-4 to 10T, cosine to 2.2e-5 over 4.3T, 333B at 2.2e-5, 167B at 7.3e-6."""
    lr = configure("recipe=report").recipe.lr
    assert sum(piece.tokens for piece in lr) == 14.8e12
    for tokens, wanted in [(0, 0), (12.6e9, 1.1e-4), (25.2e9, 2.2e-4), (9.9e12, 2.2e-4), (12.15e12, 1.21e-4),
                           (14.3e12, 2.2e-5), (14.6e12, 2.2e-5), (14.634e12, 7.3e-6), (14.8e12, 7.3e-6)]:  # fmt: skip
        assert math.isclose(value_at(lr, tokens), wanted, rel_tol=1e-6, abs_tol=1e-12), tokens


def test_the_reports_mtp_weight_and_bias_rate() -> None:
    config = configure("recipe=report")
    mtp = [config.loss.mtp_weight * factor_at(config.recipe.mtp_weight, t) for t in (0, 9.9e12, 10.1e12)]
    assert mtp == [0.3, 0.3, pytest.approx(0.1)]
    bias = [factor_at(config.balance.bias_rate_schedule, t) for t in (0, 14.2e12, 14.4e12)]
    assert bias == [1, 1, 0]


def test_the_batch_grows_in_equal_shares_of_tokens() -> None:
    """Report 4.2: 3,072 to 15,360 over the first 469B."""
    recipe = RecipeConfig(batch_start=3072, batch_increment=3072, batch_tokens=469e9)
    sizes = [batch_at(recipe, t, 15_360) for t in (0, 117e9, 118e9, 240e9, 468e9, 469e9, 1e13)]
    assert sizes == [3072, 3072, 6144, 9216, 12_288, 15_360, 15_360]
    assert check_ramp(recipe, 15_360, 512) == [6, 12, 18, 24]
    assert batch_at(RecipeConfig(), 0, 64) == 64


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("recipe.batch_start=8 recipe.batch_increment=8", "recipe.batch_tokens=0.0 must be positive"),
        ("recipe.batch_start=12 recipe.batch_increment=8 recipe.batch_tokens=9", "batch_start=12 must be a multiple"),
        ("recipe.batch_start=64 recipe.batch_increment=8 recipe.batch_tokens=9", "must be below the full batch"),
        ("recipe.batch_start=8 recipe.batch_increment=8 recipe.batch_tokens=9", "lead to 1 micro-batches"),
        ("recipe.token_scale=0", "recipe.token_scale=0.0 must be positive"),
        ("eval.ema=true", "set optim.ema"),
        ("optim.ema=1", "optim.ema=1.0 must be in"),
        ("optim.zero=2", "optim.zero=2 is unknown"),
        ("optim.zero=1 precision=fp64", "precision=fp64 needs optim.zero=0"),
        ("optim.moments=fp8", "choose fp32 or bf16"),
    ],
)
def test_bad_recipes_are_refused(overrides: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(configure(*overrides.split()), 2)


def test_stochastic_rounding_is_right_on_average_and_off_by_less_than_one_place() -> None:
    exact = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) + 0.5
    generator = torch.Generator().manual_seed(1)
    rounded = round_stochastically(exact.clone(), generator).float()
    assert float(((rounded - exact) / exact).abs().max()) < 2**-7
    drift = torch.full((200_000,), 1 + 2**-10)
    assert float(round_stochastically(drift.clone(), generator).float().mean()) == pytest.approx(1 + 2**-10, abs=1e-4)
    assert float(drift.bfloat16().float().mean()) == 1.0  # what rounding to nearest would have made of it


def test_bf16_moments_stay_close_to_fp32_and_are_reproducible() -> None:
    """The bound of training/adamw.py: 0.9 % of the first and 1.3 % of the second moment, as standard deviations."""
    runs = [_adamw_run(kind) for kind in ("fp32", "bf16", "bf16")]
    assert all(torch.equal(a, b) for a, b in zip(runs[1], runs[2], strict=True))
    weights, first, second = ((a.float() - b.float()).norm() / a.norm() for a, b in zip(*runs[:2], strict=True))
    assert float(first) < 0.009 and float(second) < 0.013 and float(weights) < 1e-3


def _adamw_run(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(20_000, generator=generator))
    groups = [{"params": [weight], "number": 0, "weight_decay": 0.1}]
    betas = (0.9, 0.95)
    optimizer = AdamW(groups, betas, 1e-8) if kind == "fp32" else LowPrecisionAdamW(groups, betas, 1e-8, seed=5)
    optimizer.init_state()
    slope = torch.randn(20_000, generator=generator)
    for _ in range(60):
        weight.grad = slope + 0.3 * torch.randn(20_000, generator=generator)
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.step()
    state = optimizer.state[weight]
    return weight.detach(), state["exp_avg"], state["exp_avg_sq"]


@pytest.fixture
def update() -> Iterator[Update]:
    config = ModelConfig(num_layers=2, hidden_size=16, dense_ffn_size=16, num_experts=4, num_groups=2,
                         groups_per_token=2, experts_per_token=2, expert_ffn_size=8, vocab_size=11)  # fmt: skip
    mesh = Mesh(Layout(1, 1, 1), 0, None, None, None, None, None)
    precision, dtype = make_precision("fp32")
    replica = build_replica(
        config, make_schedule("one_f_one_b", 1, 2), mesh, precision, BuildOptions(param_dtype=dtype)
    )
    yield make_update(replica, OptimConfig())


def test_the_average_follows_the_weights_and_can_stand_in_for_them(update: Update) -> None:
    average = WeightAverage(update, 0.9)
    shards = update.shards
    wanted = [s.master.clone() for s in shards]
    for _ in range(3):
        for bucket in update.buckets:
            bucket.grads.normal_()
        update.step(1e-2)
        average.start()
        for values, shard in zip(wanted, shards, strict=True):
            values.lerp_(shard.master, 0.1)
    average.wait()
    assert all(torch.equal(a, b) for a, b in zip(average.values, wanted, strict=True))
    before = [s.master.clone() for s in shards]
    refreshed = []
    with average.applied(lambda: refreshed.append(1)):
        assert all(torch.equal(s.master, w) for s, w in zip(shards, wanted, strict=True))
        parameter, start = next(update.buckets[0].offsets())
        assert torch.equal(parameter.flatten(), wanted[0][start : start + parameter.numel()])
    assert all(torch.equal(s.master, b) for s, b in zip(shards, before, strict=True)) and len(refreshed) == 2
    average.close()


def test_factors_default_to_one() -> None:
    assert factor_at([], 5) == 1 and factor_at([Piece(start=0.5)], 5) == 0.5


def test_orthogonalise() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 20), (20, 6), (16, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
        assert float(values.min()) > 0.3 and float(values.max()) < 1.25, shape
    assert torch.equal(orthogonalise(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_muon_moves_matrices_like_torchs_own(update: Update) -> None:
    """torch.optim.Muon computes in BF16, hence the tolerance."""
    replica_buckets = update.buckets
    ours = ReplicatedUpdate(replica_buckets, update.mesh, partial(make_flat, OptimConfig(name="muon"), 0))
    hidden = next(b for b in ours.buckets if b.hidden and not b.routed)
    pieces = [p for p in hidden.pieces if min(p.shape) > 4]
    start = {p.name: hidden_weights(ours, hidden)[p.start : p.start + p.numel].view(p.shape).clone() for p in pieces}
    theirs = {name: torch.nn.Parameter(weight.clone()) for name, weight in start.items()}
    peer = torch.optim.Muon(
        list(theirs.values()), lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for seed in range(3):
        torch.manual_seed(seed)
        hidden.grads.normal_()
        for piece in pieces:
            theirs[piece.name].grad = hidden.grads[piece.start : piece.start + piece.numel].view(piece.shape).clone()
        ours.step(1e-2)
        peer.step()
    for piece in pieces:
        mine = hidden_weights(ours, hidden)[piece.start : piece.start + piece.numel].view(piece.shape)
        moved, wanted = mine - start[piece.name], theirs[piece.name].detach() - start[piece.name]
        assert float((moved - wanted).norm() / wanted.norm()) < 0.05, piece.name


def hidden_weights(update: Update, bucket: GradBucket) -> torch.Tensor:
    return next(s.master for s in update.shards if s.bucket is bucket)
