"""Training with precision=fp8: under a pipeline as serially, with ZeRO-1, over the wire; what it keeps and sends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

import parallel.dispatch
from benchmarks.fp8 import kept_by_a_layer
from dualpipe.schedules import make_schedule
from model.fp8.quantize import quantize_tiles
from model.fp8.reference import ReferenceBackend
from model.functional import make_kernels
from model.names import named_tensors
from model.precisions import make_precision
from model.protocols import AtOnce
from parallel.build import BuildOptions, Replica, build_replica
from parallel.dispatch import RoutedDispatcher
from parallel.expert_groups import create_expert_groups
from parallel.grads import mirrors
from parallel.mesh import Layout, Mesh
from parallel.rows import Fp8Rows
from parallel.zero import load_deepspeed
from tests.spawn import run_ranks, share_out
from tests.test_serial_equality import CONFIG, make_batch, relative
from training.diagnose import find_culprit
from training.optimizer import OptimConfig, make_update
from training.step import train_step

OPTIM = OptimConfig(lr=1e-3, clip=0.5, moments="bf16")
TIMEOUT = timedelta(seconds=60)
STEPS, MICRO_BATCHES = 2, 8
# Wide enough for whole tiles, with something left over.
WIDE = replace(CONFIG, hidden_size=160, expert_ffn_size=136, dense_ffn_size=200, init_std=0.06)
Gradients = dict[str, Tensor]


def build(
    mesh: Mesh, schedule: str = "one_f_one_b", pp: int = 1, precision: str = "fp8", dispatch: str = "all_to_all",
    overlap: bool = True, micro_batches: int = MICRO_BATCHES,
) -> Replica:  # fmt: skip
    seam, dtype = make_precision(precision)
    options = BuildOptions(seed=1, param_dtype=dtype, overlap=overlap, dispatch=dispatch, timeout=TIMEOUT)
    return build_replica(WIDE, make_schedule(schedule, pp, micro_batches), mesh, seam, options)


def alone() -> Mesh:
    return Mesh(Layout(1, 1, 1), 0, None, None, None, None, None)


def join(world: int, schedule: str, pp: int, ep: int, per_node: int | None = None) -> Mesh:
    shape = make_schedule(schedule, pp, MICRO_BATCHES)
    return Mesh.create(Layout(world, pp, ep), mirrors(shape), TIMEOUT, (), per_node)


def grads_of(replica: Replica) -> Gradients:
    """By global name; those of an expert by its own."""
    found = {}
    for stage in replica.stages.values():
        parameters = dict(stage.named_parameters())
        stacked = {local: iter(p.grad) for local, p in parameters.items() if ".experts." in local}
        for name, _, local in named_tensors(stage):
            if local in parameters:
                grad = next(stacked[local]) if local in stacked else parameters[local].grad
                found[name] = grad.clone()
    return found


def train(
    replica: Replica, mesh: Mesh, zero: int = 0, micro_batches: int = MICRO_BATCHES, num_steps: int = STEPS
) -> list[tuple[float, float, Gradients]]:
    """Loss, norm and gradients of each step; the global batch is the same under every layout."""
    update = make_update(replica, replace(OPTIM, zero=zero))
    steps = []
    for step in range(num_steps):
        batch = make_batch(step, micro_batches * mesh.layout.dp)
        result = train_step(replica, update, batch[mesh.dp :: mesh.layout.dp], OPTIM.lr, OPTIM.clip, 0.01)
        steps.append((result.loss, result.grad_norm, grads_of(replica) if not zero else {}))
    update.close()
    return steps


def check_pipeline(rank: int, world: int) -> float:
    """A pipeline sends BF16 that is BF16 anyway, so only the order in which FP32 gradients are added differs."""
    serial = train(build(alone()), alone())
    worst = 0.0
    for schedule, pp in (("dualpipe", 2), ("zb1p", 2), ("dualpipev", 2)):
        mesh = join(world, schedule, pp, 1)
        for ours, wanted in zip(train(build(mesh, schedule, pp), mesh), serial, strict=True):
            worst = max(worst, abs(ours[0] / wanted[0] - 1), abs(ours[1] / wanted[1] - 1))
            worst = max(worst, *(relative(grad, wanted[2][name]) for name, grad in ours[2].items()))
            assert len(ours[2]) < len(wanted[2]) or schedule == "dualpipe"
    return worst


def test_a_pipeline_equals_the_serial_model() -> None:
    assert max(run_ranks(2, check_pipeline)) < 1e-5


def check_expert_parallel(rank: int, world: int, dispatch: str, per_node: int | None) -> tuple[float, float, float]:
    """With other ranks' experts, sums over a token's experts are rounded to BF16 in another order: little, but FP8 may
    round its neighbours apart. Against that stands what FP8 changes altogether. Many micro-batches, so that in the mean
    loss single tokens count little."""
    many = 4 * MICRO_BATCHES
    wanted, exact = share_out(rank, world, lambda precision: serial(precision, many * world), ["fp8", "fp32"])
    mesh = join(world, "one_f_one_b", 1, world, per_node)
    (ours,) = train(build(mesh, dispatch=dispatch, micro_batches=many), mesh, micro_batches=many, num_steps=1)
    return abs(ours[0] / wanted[0] - 1), distance(ours[2], wanted[2]), distance(wanted[2], exact[2])


def serial(precision: str, micro_batches: int) -> tuple[float, float, Gradients]:
    replica = build(alone(), precision=precision, micro_batches=micro_batches)
    result = train_step(replica, make_update(replica, OPTIM), make_batch(0, micro_batches), 0.0, OPTIM.clip, 0.0)
    return result.loss, result.grad_norm, grads_of(replica)


def distance(ours: Gradients, theirs: Gradients) -> float:
    names = list(ours)
    return relative(torch.cat([ours[n].flatten() for n in names]), torch.cat([theirs[n].flatten() for n in names]))


@pytest.mark.parametrize(("world", "dispatch", "per_node"), [(2, "all_to_all", None), (4, "hierarchical", 2)])
def test_experts_on_other_ranks_change_what_rounding_changes(world: int, dispatch: str, per_node: int | None) -> None:
    for loss, from_serial, of_fp8 in run_ranks(world, check_expert_parallel, dispatch, per_node):
        assert loss < 1e-3 and from_serial < 0.5 * of_fp8, (loss, from_serial, of_fp8)


def check_overlap(rank: int, world: int) -> bool:
    mesh = join(world, "dualpipe", 2, 2)
    on, again, off = (train(build(mesh, "dualpipe", 2, overlap=o), mesh) for o in (True, True, False))
    for first, second, third in zip(on, again, off, strict=True):
        assert first[:2] == second[:2] == third[:2]
        for name, grad in first[2].items():
            assert torch.equal(grad, second[2][name]) and torch.equal(grad, third[2][name]), name
    return True


def test_overlap_on_and_off_and_two_runs_are_bit_equal() -> None:
    assert all(run_ranks(4, check_overlap))


def check_zero(rank: int, world: int) -> tuple[float, float]:
    """ZeRO-1 stores weights in BF16, ZeRO-0 in FP32: FP8 makes its own from BF16 in both. Masters stay FP32."""
    load_deepspeed(torch.device("cpu"))
    results, masters = [], []
    for zero in (0, 1):  # FP32 moments here: BF16 ones are rounded at random, differently for each share
        mesh = join(world, "dualpipe", 2, 1)
        replica = build(mesh, "dualpipe", 2)
        update = make_update(replica, replace(OPTIM, zero=zero, moments="fp32"))
        for step in range(3):
            mine = make_batch(step, MICRO_BATCHES * mesh.layout.dp)[mesh.dp :: mesh.layout.dp]
            result = train_step(replica, update, mine, OPTIM.lr, OPTIM.clip, 0.01)
            results.append(result.loss)
        assert all(s.master.dtype == torch.float32 for s in update.shards)
        shares = [torch.linalg.vector_norm(s.owned(s.master), dtype=torch.float64) for s in update.shards]
        masters.append(torch.stack(shares).square().sum())
        update.close()
    with_zero, without = results[3:], results[:3]
    moved = float((masters[1] / masters[0] - 1).abs())
    return max(abs(a / b - 1) for a, b in zip(with_zero, without, strict=True)), moved


@pytest.mark.slow
def test_zero_1_trains_as_zero_0_with_masters_in_fp32() -> None:
    for loss, masters in run_ranks(4, check_zero):
        assert loss < 1e-4 and masters < 1e-6, (loss, masters)


def test_nan_is_caught_by_the_guard_and_its_layer_named() -> None:
    replica = build(alone())
    update, batch = make_update(replica, OPTIM), make_batch(0, MICRO_BATCHES)
    before = {n: p.detach().clone() for n, p in replica.stages[0].named_parameters()}
    victim = dict(replica.stages[0].named_parameters())["layers.2.attention.query_up.weight"]
    for bad in (math.inf, math.nan):
        with torch.no_grad():
            victim[0, 0] = bad
        replica.precision.refresh()
        result = train_step(replica, update, batch, 1e-3, 0.5, 0.01)
        assert result.skipped
        assert "layers.2.attention.query_up" in find_culprit(replica, batch)
    for name, parameter in replica.stages[0].named_parameters():
        same = parameter == before[name]
        assert same.all() if parameter is not victim else same.flatten()[1:].all()


# -- what is kept ------------------------------------------------------------------------------------------------------


@contextmanager
def kept_bytes(weights: set[int]) -> Iterator[list[int]]:
    """Bytes that autograd saves inside, every storage once; weights and their copies are not activations."""
    seen: dict[int, Tensor] = {}
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage().data_ptr()
        if key not in weights and key not in seen:
            seen[key] = tensor  # kept alive, so that the address is not used again
            total[0] += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield total


def test_inputs_of_linears_and_swiglus_are_kept_in_half_of_the_bytes() -> None:
    """The layers alone, of DeepSeek-V3's proportions: hidden size 7 tiles, experts 2."""
    sizes, kernels, now = {}, make_kernels(compiled=False), AtOnce()
    for name in ("bf16", "fp8"):
        seam, _ = make_precision(name)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(256, 896, generator=generator).bfloat16().requires_grad_()
        gate_up_weight = torch.nn.Parameter(torch.randn(512, 896, generator=generator))
        down_weight = torch.nn.Parameter(torch.randn(896, 256, generator=generator))
        products = seam.of("mlp_gate_up")
        gate_up = products.linear(x, gate_up_weight, now)  # this makes the copies of the weights
        products.swiglu_linear(gate_up, None, down_weight, None, kernels, now)
        copies = getattr(seam, "_copies", {})
        weights = {t.untyped_storage().data_ptr() for t in (*copies.values(), gate_up_weight, down_weight)}
        with kept_bytes(weights) as linear:
            gate_up = products.linear(x, gate_up_weight, now)
        with kept_bytes(weights) as after_swiglu:
            products.swiglu_linear(gate_up, None, down_weight, None, kernels, now)
        sizes[name] = linear[0], after_swiglu[0]
    assert sizes["bf16"] == (256 * 896 * 2, 256 * (512 + 256) * 2)
    assert sizes["fp8"][0] <= 0.55 * sizes["bf16"][0]
    assert sizes["fp8"][1] <= 0.36 * sizes["bf16"][1], "the SwiGLU's result is made again, not kept"


def test_a_layer_of_deepseek_v3_keeps_six_tenths_of_its_bytes_altogether() -> None:
    """All that is alive from its forward to its backward, on the meta device: what layers let go is really gone."""
    assert kept_by_a_layer("fp8") <= 0.6 * kept_by_a_layer("bf16")


# -- what travels ------------------------------------------------------------------------------------------------------


def send(rank: int, world: int, per_node: int | None) -> dict[str, int]:
    """Bytes that this rank sends, by what and how; and that FP8 brings exactly what was quantised."""
    groups = create_expert_groups([list(range(world))], TIMEOUT, per_node)
    generator = torch.Generator().manual_seed(rank)
    D, K, E = 896, 2, 4 * world
    x = torch.randn(30 + rank, D, generator=generator).bfloat16()
    x[3] = 0
    experts_TK = torch.rand(len(x), E, generator=generator).argsort(1)[:, :K]
    gates = torch.rand(experts_TK.shape, generator=generator)
    sent: dict[str, int] = {}
    real, label = parallel.dispatch.all_to_all, ""

    def counting(out: Tensor, block: Tensor, received: Any, rows: Any, group: Any) -> Any:
        sent[label] = sent.get(label, 0) + block[0].nbytes * sum(rows) if len(block) else sent.get(label, 0)
        return real(out, block, received, rows, group)

    parallel.dispatch.all_to_all = counting
    results = {}
    try:
        for name, rows in (("bf16", None), ("fp8", Fp8Rows(ReferenceBackend(), torch.bfloat16))):
            exchange = RoutedDispatcher(groups, 4, rows).open()
            label = "counts"
            (table,) = exchange.counts.start(experts_TK).wait()
            label = f"{name} dispatch"
            arrived, _, counts = exchange.dispatch.start(x, gates, experts_TK, table).wait()
            label = f"{name} combine"
            (home,) = exchange.combine.start(arrived).wait()
            label = f"{name} combine backward"
            assert exchange.combine.start_backward is not None
            (dy,) = exchange.combine.start_backward(x).wait()
            results[name] = arrived, dy, counts
            assert home.dtype == arrived.dtype == dy.dtype == torch.bfloat16
    finally:
        parallel.dispatch.all_to_all = real
    for plain, quantised in zip(results["bf16"][:2], results["fp8"][:2], strict=True):
        assert torch.equal(quantised, quantize_tiles(plain, True).dequantize(torch.bfloat16))
        assert torch.equal(quantize_tiles(quantised, True).dequantize(torch.bfloat16), quantised)
    return sent


def test_every_scale_travels_as_one_byte_without_loss() -> None:
    """From 2⁻¹²⁶ to 2¹²⁰ (3.4e38 / 448, rounded up); and NaN, for a group with an infinity."""
    rows = Fp8Rows(ReferenceBackend(), torch.float32)
    powers = torch.arange(-126, 121, dtype=torch.float64).exp2()
    x = torch.cat([(448 * powers).clamp(max=torch.finfo(torch.float32).max), torch.tensor([math.inf, 0.0, 1e-40])])
    x_ND = x.float().unsqueeze(1).repeat(1, 129)
    wanted = rows.quantize(x_ND)
    values, scales = rows.pack(x_ND)
    assert (values.shape[1], scales.shape[1], scales.dtype) == (129, 2, torch.uint8)
    assert len(wanted.scales[:-3, 0].unique()) == 247
    arrived = rows.unpack((values, scales))
    assert torch.equal(arrived.nan_to_num(7.0), wanted.dequantize().nan_to_num(7.0))
    assert arrived[247].isnan().all() and (arrived[248] == 0).all()


@pytest.mark.parametrize(("world", "per_node"), [(2, None), (4, 2)])
def test_tokens_and_gradients_travel_in_half_of_the_bytes(world: int, per_node: int | None) -> None:
    for sent in run_ranks(world, send, per_node):
        assert sent["fp8 dispatch"] <= 0.55 * sent["bf16 dispatch"]
        assert sent["fp8 combine backward"] <= 0.55 * sent["bf16 combine backward"]
        assert sent["fp8 combine"] == sent["bf16 combine"] > 0
