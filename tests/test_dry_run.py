"""A dry run: memory is what a real step takes, traffic what a count by hand gives, and what is wrong is said."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dualpipe.costs import uniform
from dualpipe.schedules import make_schedule
from dualpipe.simulator import simulate
from dualpipe.wgrad import WeightGradQueue
from model.balance import Balance
from model.batch import MicroBatch
from model.precisions import make_precision
from parallel.build import BuildOptions, build_stages
from parallel.mesh import EP_ACROSS_NODES, Layout, Mesh
from parallel.rehearsal import PaperDispatcher, Phase, Rehearsal, peak_bytes, rehearse
from parallel.traffic import Bytes, Nodes, Spread, Tokens, expert_bytes, pipeline_bytes, spread_of
from tests.job import ROOT
from tests.test_config import compose
from training.capacity import bytes_per_rank
from training.config import Config
from training.dry_run import Plan, make_plan
from training.forecast import errors, warnings

DEEPSEEK = (
    "model=deepseek_v3_671b parallel.pp=16 parallel.ep=64 precision=bf16 schedule.micro_batches=120 data.seq_len=4096 "
    "data.micro_batch_size=1 optim.zero=1 optim.moments=bf16"
)


@pytest.fixture(scope="module")
def deepseek() -> Plan:
    return make_plan(compose(DEEPSEEK), 2048)


def test_the_report_s_layout(deepseek: Plan) -> None:
    """Against the report's own figures (4.1, 4.2; Insights, table 4) where it gives any."""
    assert deepseek.tokens_per_step == 15_360 * 4096
    assert sum(rank.parameters for rank in deepseek.ranks) * 64 > 671e9
    assert deepseek.timeline.peak_activations == (17,) * 16
    for rank in deepseek.ranks:
        assert rank.memory.total == bytes_per_rank(deepseek.config, deepseek.layout, deepseek.schedule, rank.pp * 128)
        mirror = deepseek.ranks[15 - rank.pp]
        assert (rank.stages, rank.memory, rank.activations) == (mirror.stages, mirror.memory, mirror.activations)
    middle = deepseek.ranks[5]
    assert middle.traffic.pipeline.across == 240 * 4096 * 7168 * 2  # 120 activations and as many gradients
    assert not dist.is_initialized()
    # 8 MoE layers, 120 micro-batches: each token visits at most 8 ranks, and its row goes there and back, twice.
    most = 8 / 2 * 120 * 4096 * 8 * 4 * (7168 * 2 + 32)
    assert 0.6 * most < middle.traffic.experts.inside + middle.traffic.experts.across < most


def test_operations_are_those_of_the_model(deepseek: Plan) -> None:
    """Forward of a stage of four MoE layers, counted by hand."""
    c, tokens = deepseek.config.model, 4096
    queries = c.hidden_size * c.query_rank + c.query_rank * 128 * 192
    attention = queries + c.hidden_size * 576 + 512 * 128 * 256 + 128 * 128 * c.hidden_size
    weights = attention + 9 * 3 * c.hidden_size * c.expert_ffn_size + c.hidden_size * c.num_experts
    scores = 128 * (192 + 192) * 4096 / 2  # values are padded to the width of keys; a causal kernel does half
    assert deepseek.rehearsals[5].forward.flops == pytest.approx(4 * tokens * 2 * (weights + scores), rel=1e-3)
    assert deepseek.rehearsals[5].weights.flops == pytest.approx(4 * tokens * 2 * weights, rel=1e-2)


def test_what_is_wrong(deepseek: Plan) -> None:
    (error,) = errors(deepseek)
    assert "has launch.device_gib=80; most of it are activations" in error
    roomy = replace(deepseek, config=compose(f"{DEEPSEEK} launch.device_gib=200"))
    assert errors(roomy) == []
    (better,) = (line for line in warnings(deepseek) if "parallel.layers_per_stage=" in line)
    sizes = better.partition("layers_per_stage=")[2].split()[0]
    bubble = int(better.rpartition(" ")[2].rstrip("%"))
    assert bubble < 20 < 100 * deepseek.timeline.bubble
    moved = make_plan(compose(f"{DEEPSEEK} parallel.layers_per_stage={sizes}"), 2048)
    assert round(100 * moved.timeline.bubble) == bubble
    experts = "model.num_experts=18 model.num_groups=2 parallel.ep=18 parallel.order=ep_across_nodes"
    slow = make_plan(compose(f"parallel.pp=2 {experts}"), 36)
    assert [line.split(";")[0].split(":")[0] for line in warnings(slow)] == [
        "36 ranks do not fill nodes of 8",
        "expert parallelism crosses nodes and the pipeline does not",
    ]


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (DEEPSEEK, 2047, "2047 processes cannot be divided into pipelines of parallel.pp=16"),
        (f"{DEEPSEEK} parallel.ep=48", 2048, "parallel.ep=48 does not divide the 128 data-parallel ranks"),
        (f"{DEEPSEEK} schedule.micro_batches=30", 2048, "at least 32; got 30"),
        (f"{DEEPSEEK} data.micro_batch_size=100", 2048, "more than any device takes"),
        ("parallel.dispatch=hierarchical parallel.ep=6 model.num_experts=12", 24, "parallel.ranks_per_node=8 do not"),
        ("parallel.dispatch=deep_ep", 2, "needs an NVIDIA GPU and precision=bf16 or fp8"),
    ],
)
def test_a_configuration_that_cannot_work(overrides: str, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(compose(overrides), world)


def test_another_machine_s_devices_and_packages_do_not_matter() -> None:
    plan = make_plan(compose("launch.device=cuda precision=bf16 parallel.dispatch=deep_ep parallel.ep=2"), 4)
    assert errors(plan) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [True, False])
def test_what_is_kept_on_paper_is_kept_in_fact(precision: str, recompute: bool) -> None:
    """The same stages on a CPU, with the real dispatcher and every expert equally busy; kernels for CPUs keep alike."""
    config = replace(Config().model, mtp_depth=1, recompute=recompute)
    kept = []
    for device in ("cpu", "meta"):
        queue = WeightGradQueue()
        computing, dtype = make_precision(precision)
        options = BuildOptions(param_dtype=dtype, device=device, balance=Balance(0.0, 0.0, "uniform"))
        schedule = make_schedule("one_f_one_b", 2, 2)
        on_paper = PaperDispatcher(config.num_experts, 1.0)
        for pp in range(2):
            mesh = Mesh(Layout(2, 2, 1), pp, None, None, None, None, None)
            stages = build_stages(
                config, schedule, mesh, computing, options, queue, on_paper if device == "meta" else None
            )
            tokens = torch.zeros(2, 64, dtype=torch.int64, device=device)
            positions = torch.arange(64, device=device).expand(2, 64)
            found = rehearse(stages[pp], MicroBatch(tokens, tokens, tokens, positions, 1.0, (0.1,)), queue)
            kept.append([found.forward.kept, found.inputs.kept])
    (first, second), paper = kept[:2], kept[2:]
    assert paper[0] == pytest.approx(first, rel=0.03)
    assert paper[1] == pytest.approx(second, rel=0.03)


def test_the_peak_of_a_row() -> None:
    """1F1B on two ranks: the first keeps two micro-batches; a backward needs 10 more than its micro-batch kept."""
    stage = Rehearsal(Phase(7, 5, 1), Phase(9, 8, 1), Phase(9, 0, 1), Phase(15, 0, 2))
    schedule = make_schedule("one_f_one_b", 2, 4)
    assert peak_bytes(schedule.steps[0], {0: stage}) == 5 + 15
    assert peak_bytes(schedule.steps[1], {1: stage}) == 15
    pairs = make_schedule("dualpipe", 2, 4)
    assert peak_bytes(pairs.steps[0], {0: stage, 1: stage}) == max(5 + 5 + 7 + 15 - 5, 5 + 5 + 15)


def test_traffic_by_hand() -> None:
    """Four ranks of EP on two nodes: of three peers one is near. Two micro-batches, one MoE layer, ten tokens."""
    layout = Layout(4, 1, 4)
    schedule = make_schedule("one_f_one_b", 1, 2)
    tokens = Tokens(10, 4, torch.float32, experts=2)
    row = (16 + 8 + 8) + 16 + 16 + (16 + 8)
    rows = 2 * 10 * 2.0 * 3 / 4
    found = expert_bytes(schedule, 0, {0: 1}, tokens, Nodes(layout, 2), Spread(2.0, 1.5))
    assert (found.inside, found.across) == pytest.approx((rows * row / 3, rows * row * 2 / 3))
    far = expert_bytes(schedule, 0, {0: 1}, replace(tokens, hierarchical=True), Nodes(layout, 2), Spread(2.0, 1.5))
    assert (far.inside, far.across) == pytest.approx((20 * 2.0 / 2 * row, 20 * 1.5 / 2 * row))
    two = Layout(4, 2, 1)  # ranks 0, 1 are PP rank 0
    assert pipeline_bytes(make_schedule("one_f_one_b", 2, 4), 0, 100, Nodes(two, 2)) == Bytes(0, 400)
    inside = Layout(4, 2, 1, EP_ACROSS_NODES)
    assert pipeline_bytes(make_schedule("one_f_one_b", 2, 4), 1, 100, Nodes(inside, 2)) == Bytes(400, 0)


def test_where_tokens_go() -> None:
    """Every expert its own rank: as many ranks as experts. One group per node: no more nodes than groups."""
    config = replace(Config().model, num_experts=16, experts_per_token=4, num_groups=4, groups_per_token=2)
    spread = spread_of(config, 16, 4)
    assert spread.ranks == 4.0
    assert 1.0 < spread.nodes <= 2.0
    assert spread_of(config, 1, 1) == Spread(1.0, 1.0)


def test_the_bubble_is_the_simulator_s() -> None:
    plan = make_plan(compose("parallel.pp=4 schedule.micro_batches=8 model.num_layers=12 model.num_dense_layers=0"), 4)
    even = simulate(plan.schedule, uniform(4))
    assert plan.timeline.peak_activations == even.peak_activations
    assert 0.5 * even.bubble < plan.timeline.bubble < 2 * even.bubble


@pytest.mark.slow
def test_the_command() -> None:
    """No torchrun, no GPU, no files; the exit code says whether it can train."""
    command = [sys.executable, "train.py", "dry_run=true", "launch.processes=2048", *DEEPSEEK.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "2048 ranks = PP 16 × DP 128, EP 64, 256 nodes of 8" in done.stdout
    assert "Bubble " in done.stdout
    assert "Sent by each rank per step, GiB" in done.stdout
    assert "\nerror: PP rank " in done.stdout
    fits = subprocess.run([*command, "launch.device_gib=200"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert fits.returncode == 0, fits.stderr
    assert "It can train like this." in fits.stdout
    wrong = subprocess.run([*command, "parallel.pp=15"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: 2048 processes cannot be divided")
