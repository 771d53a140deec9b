"""Training under any layout equals the serial oracle: losses, every gradient, the norm, weights, router biases.

The oracle sees the whole global batch in one process. Each case trains three steps; after each of them everything is
compared by global name. A rank checks what it holds itself, so all mirrors and replicas are checked, not one copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
import torch

from dualpipe.auto import search
from dualpipe.costs import Costs
from dualpipe.schedule import Schedule
from dualpipe.schedules import make_schedule
from model.balance import Balance
from model.batch import IGNORE, MicroBatch
from model.config import ModelConfig
from model.loss import LossConfig
from model.names import named_tensors
from model.precision import CastPrecision
from parallel.balance import RouterTable
from parallel.build import BuildOptions, build_replica
from parallel.grads import embedding_holders, mirrors
from parallel.mesh import EP_ACROSS_NODES, PP_ACROSS_NODES, Layout, Mesh
from tests.oracle import Oracle
from tests.spawn import run_ranks, share_out
from training.optimizer import OptimConfig, make_update
from training.step import train_step

CONFIG = ModelConfig(
    vocab_size=31, num_layers=5, num_dense_layers=1, hidden_size=16, dense_ffn_size=24, num_heads=2, query_rank=12,
    key_value_rank=10, head_dim=6, rope_dim=4, value_dim=8, num_experts=8, experts_per_token=3, num_shared_experts=1,
    expert_ffn_size=12, num_groups=4, groups_per_token=2, init_std=0.3,
)  # fmt: skip
OPTIM = OptimConfig(lr=1e-3, clip=0.5)
BIAS_RATE = 0.05
GLOBAL_MICRO_BATCHES = 16  # enough for DualPipe on 4 ranks × 2 pipelines


@dataclass(frozen=True)
class Case:
    pp: int
    ep: int = 1
    schedule: str = "dualpipe"
    dtype: torch.dtype = torch.float64
    steps: int = 3
    layers: tuple[int, ...] | None = None
    order: str = PP_ACROSS_NODES
    placement: tuple[int, ...] = ()  # the order of the experts over the EP ranks, in every layer; () = 0, 1, …
    balance: tuple[float, float] = (0.0, 0.0)  # coefficients of the losses per sequence and per micro-batch
    config: ModelConfig = field(default_factory=lambda: CONFIG)
    loss: LossConfig = field(default_factory=LossConfig)

    @property
    def tolerance(self) -> float:
        return 1e-10 if self.dtype is torch.float64 else 1e-5


def make_batch(step: int, num: int = GLOBAL_MICRO_BATCHES) -> list[MicroBatch]:
    """Micro-batches of two rows with documents of random length; the number of targets differs between them."""
    generator = torch.Generator().manual_seed(step)
    batch = []
    for _ in range(num):
        B, S = 2, 10
        tokens = torch.randint(0, CONFIG.vocab_size, (B, S + 1), generator=generator)
        ends = torch.rand(B, S, generator=generator) < 0.2
        documents = torch.cat((torch.zeros(B, 1, dtype=torch.int64), ends.long().cumsum(1)[:, :-1]), 1)
        starts = torch.cat((torch.ones(B, 1, dtype=torch.bool), ends[:, :-1]), 1)
        first = torch.where(starts, torch.arange(S), 0).cummax(1).values
        targets = tokens[:, 1:].masked_fill(ends, IGNORE)
        batch.append(MicroBatch(tokens[:, :-1].contiguous(), targets, documents, torch.arange(S) - first))
    return batch


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def by_layer(case: Case) -> dict[int, tuple[int, ...]]:
    """The case's order of the experts, for every layer that has any."""
    return dict.fromkeys(range(case.config.num_layers + 1), case.placement) if case.placement else {}


@dataclass(frozen=True)
class OracleStep:
    """What the oracle had after one step, by global name."""

    loss: float
    mtp_losses: list[float]
    z_loss: float
    balance_loss: float
    norm: float
    grads: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]
    loads: dict[str, torch.Tensor]


def train_oracle(case: Case) -> list[OracleStep]:
    """The trajectory that every layout must follow; it depends on the case's model, dtype and steps alone.

    With MTP, an FP32 oracle's own rounding comes near the bound of FP32 cases; there it is computed in FP64, from the
    same weights, so that a difference is the layout's alone.
    """
    start = whole_model(case)
    if case.config.mtp_depth:
        start = {n: t if n.endswith("bias_E") else t.double() for n, t in start.items()}
    oracle = Oracle(case.config, start, case.balance)
    oracle.mtp_weight, oracle.z_weight = case.loss.mtp_weight, case.loss.z_weight
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in oracle.params.values() if p.dim() > 1], "weight_decay": OPTIM.weight_decay},
            {"params": [p for p in oracle.params.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps,
    )  # fmt: skip
    steps = []
    for step in range(case.steps):
        optimizer.zero_grad()
        terms = oracle.terms(make_batch(step))
        (oracle.weighted(terms) + oracle.balance_loss).backward()
        main, *mtp, z = (term.item() for term in terms)
        norm = clip_plainly(list(oracle.params.values()), OPTIM.clip)
        grads = {name: p.grad.clone() for name, p in oracle.params.items() if p.grad is not None}
        optimizer.step()
        loads = {name: load.clone() for name, load in oracle.loads.items()}
        oracle.update_biases(BIAS_RATE)
        weights = {name: p.detach().clone() for name, p in oracle.params.items()}
        biases = {name: b.clone() for name, b in oracle.biases.items()}
        steps.append(OracleStep(main, mtp, z, oracle.balance_loss.item(), norm, grads, weights, biases, loads))
    return steps


def schedule_of(case: Case, num: int) -> Schedule:
    """By name; or one that is searched for at the costs of uneven stages, with parameters once if that is asked for."""
    if not case.schedule.startswith("auto"):
        return make_schedule(case.schedule, case.pp, num)
    ends = (1.0, *[1.0] * (case.pp - 2), 1.7)
    costs = Costs(ends, ends, ends, overlap=0.8, latency=0.1)
    return search(case.pp, num, costs, bidirectional=case.schedule == "auto", effort=30_000).schedule


def check_case(rank: int, case: Case, world: int, oracle: list[OracleStep]) -> None:
    """Train one layout and compare what this rank holds with the oracle after every step."""
    layout = Layout(world, case.pp, case.ep, case.order)
    schedule = schedule_of(case, GLOBAL_MICRO_BATCHES // layout.dp)
    holders = embedding_holders(schedule, case.config)
    mesh = Mesh.create(layout, mirrors(schedule), timedelta(seconds=60), holders)
    options = BuildOptions(
        seed=1,
        param_dtype=case.dtype,
        layers_per_stage=case.layers,
        balance=Balance(*case.balance),
        placement=by_layer(case),
        timeout=timedelta(seconds=60),
    )
    replica = build_replica(case.config, schedule, mesh, CastPrecision(case.dtype), options)
    update = make_update(replica, OPTIM)
    routers = RouterTable.create(replica.stages, schedule, mesh, case.config)
    for step, wanted in enumerate(oracle):
        mine = make_batch(step)[mesh.dp :: layout.dp]
        result = train_step(replica, update, mine, OPTIM.lr, OPTIM.clip, BIAS_RATE, case.loss)
        label = f"{case.schedule} pp={case.pp} ep={case.ep} dp={layout.dp} {case.dtype} step {step} rank {rank}"
        terms = {"loss": (result.loss, wanted.loss)}
        if case.loss.z_weight:
            terms["z-loss"] = (result.z_loss or 0.0, wanted.z_loss)
        pairs = zip(result.mtp_losses, wanted.mtp_losses, strict=True)
        terms |= {f"MTP loss {k}": pair for k, pair in enumerate(pairs, 1)}
        for name, (ours, theirs) in terms.items():
            assert abs(ours - theirs) <= case.tolerance * theirs, f"{label}: {name}: {ours} and {theirs}"
        assert abs(result.grad_norm - wanted.norm) <= case.tolerance * wanted.norm, f"{label}: gradient norm"
        counts, biases = routers.gather(result.counts, replica.stages, mesh)
        if rank == 0:
            assert [f"{name}.router.bias_E" for name in routers.names] == list(wanted.loads), label
            assert torch.equal(counts.load_LE, torch.stack(list(wanted.loads.values()))), f"{label}: loads"
            assert torch.equal(biases, torch.stack(list(wanted.biases.values())).double()), f"{label}: biases"
            assert abs(counts.loss_L.sum() - wanted.balance_loss) <= 1e-6 * wanted.balance_loss + 1e-9, label
        compare_grads(replica.stages, wanted, case.tolerance, label)
        compare_weights(replica.stages, wanted, case.tolerance, label)


def clip_plainly(parameters: list[torch.Tensor], limit: float) -> float:
    """Global-norm clipping. (torch's own adds 1e-6 to the norm, too much for a comparison to 1e-10.)"""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = float(torch.stack([g.double().square().sum() for g in grads]).sum().sqrt())
    for grad in grads:
        grad *= min(1.0, limit / norm)
    return norm


def whole_model(case: Case) -> dict[str, torch.Tensor]:
    schedule = make_schedule("one_f_one_b", 1, 1)
    options = BuildOptions(seed=1, param_dtype=case.dtype)
    mesh = Mesh(Layout(1, 1, 1), 0, None, None, None, None, None)
    replica = build_replica(case.config, schedule, mesh, CastPrecision(case.dtype), options)
    return {name: tensor.detach() for name, tensor, _ in named_tensors(replica.stages[0])}


def compare_grads(stages: dict[int, Any], wanted: OracleStep, tolerance: float, label: str) -> None:
    for stage in stages.values():
        parameters = dict(stage.named_parameters())
        stacked = {local: iter(p.grad) for local, p in parameters.items() if ".experts." in local}
        for name, tensor, local in named_tensors(stage):
            if local in parameters:
                grad = next(stacked[local]) if local in stacked else parameters[local].grad
                theirs = wanted.grads[name]
                assert relative(grad, theirs) <= tolerance, f"{label}: gradient of {name}: {relative(grad, theirs)}"
                assert grad.shape == tensor.shape


def compare_weights(stages: dict[int, Any], wanted: OracleStep, tolerance: float, label: str) -> None:
    for stage in stages.values():
        for name, tensor, _ in named_tensors(stage):
            if name.endswith("bias_E"):
                assert torch.equal(tensor, wanted.biases[name]), f"{label}: {name}"
            else:
                theirs = wanted.weights[name]
                error = relative(tensor.detach(), theirs)
                assert error <= tolerance, f"{label}: weight {name}: {error}"


def check_cases(rank: int, world: int, cases: list[Case]) -> int:
    different: dict[tuple[str, torch.dtype, int], Case] = {}
    keys = [(repr((case.config, case.loss, case.balance)), case.dtype, case.steps) for case in cases]
    for key, case in zip(keys, cases, strict=True):
        different.setdefault(key, case)
    trajectories = dict(zip(different, share_out(rank, world, train_oracle, list(different.values())), strict=True))
    for key, case in zip(keys, cases, strict=True):
        check_case(rank, case, world, trajectories[key])
    return len(cases)


def both_precisions(cases: list[Case]) -> list[Case]:
    return [replace(c, dtype=d) for c in cases for d in (torch.float64, torch.float32)]


NO_COMPRESSION = replace(CONFIG, query_rank=0, num_shared_experts=0, groups_per_token=4, num_dense_layers=0)
SHUFFLED = (5, 0, 3, 6, 1, 7, 2, 4)
LOSSES = (0.3, 0.2)  # of the size of the token loss's own pull on the router, so that an error of theirs shows
AUTO = [Case(2, schedule="auto", steps=2), Case(2, schedule="auto, parameters once", steps=2)]
OTHERS = ("dualpipev", "interleaved_1f1b", "zb1p", "zbv", "gpipe")
CASES = {
    1: [Case(1, schedule="one_f_one_b"), Case(1), Case(1, config=NO_COMPRESSION), Case(1, balance=LOSSES)],
    2: [
        Case(2),
        Case(2, schedule="one_f_one_b"),
        Case(2, layers=(1, 4)),
        Case(1, ep=2),
        Case(2, config=NO_COMPRESSION),
        Case(2, balance=LOSSES),
        Case(1, ep=2, balance=LOSSES),
        Case(1, ep=2, placement=SHUFFLED),
    ]
    + [Case(2, schedule=name, steps=2) for name in OTHERS]
    + AUTO,
    4: [Case(4), Case(4, schedule="one_f_one_b"), Case(4, schedule="auto", steps=2), Case(4, layers=(2, 1, 1, 1))]
    + [Case(2, ep, s) for ep in (1, 2) for s in ("dualpipe", "one_f_one_b")],
    8: [Case(4, ep, s) for ep in (1, 2) for s in ("dualpipe", "one_f_one_b")]
    + [Case(2, ep=4), Case(2, ep=2, order=EP_ACROSS_NODES), Case(1, ep=8)]
    + [Case(4, ep=2, balance=LOSSES, placement=SHUFFLED, config=replace(CONFIG, mtp_depth=1), steps=2)],
}


@pytest.mark.parametrize("world", sorted(CASES))
def test_training_equals_the_serial_oracle(world: int) -> None:
    cases = both_precisions(CASES[world])
    assert run_ranks(world, check_cases, cases, timeout=500) == [len(cases)] * world
