"""Parameter counts, FLOPs and memory from the configuration alone, against published figures and built models."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from dualpipe.schedules import make_schedule
from dualpipe.wgrad import WeightGradQueue
from model.__main__ import describe, load_preset, main
from model.activations import stage_activations
from model.batch import MicroBatch
from model.config import ModelConfig
from model.describe import Layout, cache_bytes, count_parameters, rank_memory, training_flops
from model.hf import entries
from model.names import named_tensors
from model.precisions import make_precision
from model.stage import ModelStage
from parallel.build import BuildOptions, build_stages
from parallel.mesh import Layout as MeshLayout
from parallel.mesh import Mesh
from parallel.rehearsal import PaperDispatcher, rehearse
from tests.test_parity import configurations

ROOT = Path(__file__).parent.parent


def on_meta(config: ModelConfig) -> ModelStage:
    """The model without memory."""
    mesh = Mesh(MeshLayout(1, 1, 1), 0, None, None, None, None, None)
    precision, dtype = make_precision("fp32")
    options = BuildOptions(param_dtype=dtype, device="meta")
    return build_stages(config, make_schedule("one_f_one_b", 1, 1), mesh, precision, options, WeightGradQueue())[0]


def test_the_full_model_has_the_published_size() -> None:
    """FACTS: 671B total, 37B active, 685B with MTP as stored on the Hub, 250 GFLOP per token, 70,272 bytes of cache."""
    config = load_preset("deepseek_v3_671b")
    tracemalloc.start()
    counts = count_parameters(config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6
    assert round(counts.main / 1e9) == 671
    assert 37e9 <= counts.active < 38e9
    stored = counts.main + counts.mtp + sum(math.prod(e.shape) for e in entries(config) if e.is_copy)
    assert 684e9 <= stored < 685.5e9
    assert round(training_flops(config, 4096) / 1e9) == 250
    assert cache_bytes(config) == 70_272


def test_the_16b_model_has_the_published_size() -> None:
    counts = count_parameters(load_preset("deepseek_v2_lite_16b"))
    assert round(counts.main / 1e9, 1) == 15.7
    assert 2.4e9 <= counts.active - counts.embedding < 2.5e9


@pytest.mark.parametrize("name", ["tiny", "small", "mini", "deepseek_v2_lite_16b", "deepseek_v3_671b"])
def test_counts_are_those_of_the_modules(name: str) -> None:
    config = load_preset(name)
    counts = count_parameters(config)
    assert counts.main + counts.mtp == sum(p.numel() for p in on_meta(config).parameters())


@given(configurations())
@settings(max_examples=30, deadline=None)
def test_the_table_of_names_is_complete(config: ModelConfig) -> None:
    """Every tensor of the model is in the table with all its rows, and nothing else is."""
    rows: dict[str, int] = {}
    for entry in entries(config):
        if not entry.is_copy:
            rows[entry.ours] = rows.get(entry.ours, 0) + entry.rows.stop - entry.rows.start
    assert rows == {name: len(tensor) for name, tensor, _ in named_tensors(on_meta(config))}


def test_memory_of_ranks_adds_up() -> None:
    config = load_preset("mini")
    counts = count_parameters(config)
    alone = rank_memory(config, Layout(), 64)
    biases = config.num_moe_layers * config.num_experts
    assert alone.parameters == counts.main + biases
    assert alone.gradients == 4 * alone.parameters
    assert alone.optimizer == 8 * alone.parameters
    halves = rank_memory(config, Layout(pp=2, mirrored=False, zero=False), 64)
    assert alone.parameters / 2 <= halves.parameters < alone.parameters
    both = rank_memory(config, Layout(pp=2, mirrored=True), 64)
    assert both.parameters == alone.parameters
    assert both.optimizer == alone.optimizer / 2
    spread = rank_memory(config, Layout(dp=4, ep=4), 64)
    assert spread.parameters == alone.parameters - counts.routed * 3 // 4
    assert spread.optimizer == 8 * ((alone.parameters - counts.routed) / 4 + counts.routed / 4)


@pytest.mark.parametrize("name", ["tiny", "mini", "deepseek_v3_671b"])
@pytest.mark.parametrize(("recompute", "depth"), [(False, 0), (True, 1), (False, 2)])
@pytest.mark.parametrize("tokens", [256, 4096])
def test_activations_are_those_that_the_modules_keep(name: str, recompute: bool, depth: int, tokens: int) -> None:
    config = replace(load_preset(name), num_layers=3, num_dense_layers=1, recompute=recompute, mtp_depth=depth)
    precision, dtype = make_precision("bf16", here=False)
    mesh, queue = Mesh(MeshLayout(1, 1, 1), 0, None, None, None, None, None), WeightGradQueue()
    options, dispatcher = BuildOptions(param_dtype=dtype, device="meta"), PaperDispatcher(config.num_experts, 1.0)
    schedule = make_schedule("one_f_one_b", 1, 1)
    stage = build_stages(config, schedule, mesh, precision, options, queue, dispatcher)[0]
    ids = torch.empty((1, tokens), dtype=torch.int64, device="meta")
    kept = rehearse(stage, MicroBatch(ids, ids, ids, ids, 1.0, (1.0,) * depth), queue).forward.kept
    assert 0.98 < stage_activations(config, range(3), True, tokens) / kept < 1.0


def test_activations_of_a_pipeline_are_those_of_its_schedule() -> None:
    """DualPipe's ranks keep PP + 1 micro-batches, rank r of 1F1B PP − r."""
    config = replace(load_preset("mini"), num_layers=8)
    layers = stage_activations(config, range(4, 6), False, 64)
    dual, plain = (rank_memory(config, Layout(pp=4, mirrored=mirrored), 64) for mirrored in (True, False))
    assert dual.micro_batches == 5
    assert plain.micro_batches == 4 - plain.rank
    held = range(2 * plain.rank, 2 * plain.rank + 2)
    assert plain.activations == plain.micro_batches * stage_activations(config, held, False, 64)
    assert 0.8 * 5 * layers < dual.activations < 1.2 * 5 * layers


def test_the_table_prints_and_bad_input_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    text = describe(load_preset("tiny"), 256, Layout())
    assert "active per token" in text
    for words, message in (
        (["describe", "model=none"], "choose one of"),
        (["describe", "modl=tiny"], "modl: unknown"),
        (["describe", "model=tiny", "model.layers=3"], "layers"),
        (["describe", "model=tiny", "model.num_layers=x"], "Integer"),
        (["describe", "model=tiny", "pp=9"], "num_layers"),
        (["describe", "model=tiny", "batch=0"], "batch=0"),
        (["describe", "model=tiny", "batch=1.5"], "batch=1.5 must be a whole number"),
        (["describe", "model=tiny", "seq="], "seq= must be a whole number"),
        (["describe", "model=tiny", "seq={"], "error: "),
        (["describe", "model=tiny", "precision.formats.head=fp8"], "precision=fp8"),
        (["describe", "model=tiny", "dp=3", "ep=2"], "ep=2"),
        ([], "usage"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "model", "describe", "model=deepseek_v3_671b", "pp=16", "dp=128", "ep=64"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "671.03B" in done.stdout
