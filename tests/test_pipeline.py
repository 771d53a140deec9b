"""Plain torch modules through `Pipeline`: every schedule gives the serial gradients and the simulator's memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualpipe.buffers import BufferPool
from dualpipe.costs import uniform
from dualpipe.fill import IdleMeter, fill_idle
from dualpipe.pipeline import Pipeline
from dualpipe.schedule import Action, Kind, Schedule, parse_step
from dualpipe.schedules import SCHEDULES, make_schedule
from dualpipe.shapes import ShapeError
from dualpipe.simulator import simulate
from dualpipe.stage import TensorSpec
from dualpipe.validate import validate
from tests.spawn import run_ranks

ROOT = Path(__file__).parent.parent
WIDTH = 6


class Stage(nn.Module):
    """Two Linears and something that is not one; passes on its activations and an integer tensor nobody learns from."""

    def __init__(self, number: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        for parameter in self.parameters():
            parameter.data.normal_(std=0.5, generator=generator)
        self.double()

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.down(torch.tanh(self.up(x))) * self.scale + positions[:, None], positions


def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return (output[0] - target).square().mean()


def make_batch(num: int, step: int = 0) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Micro-batches of different lengths."""
    generator = torch.Generator().manual_seed(step)
    lengths = [2 + (m + step) % 3 for m in range(num)]
    xs = [torch.randn(n, WIDTH, dtype=torch.float64, generator=generator) for n in lengths]
    ys = [torch.randn(n, WIDTH, dtype=torch.float64, generator=generator) for n in lengths]
    return [(x, torch.arange(len(x))) for x in xs], ys


def serial(num_stages: int, steps: int, num: int) -> tuple[list[nn.Module], list[list[float]]]:
    """The stages after `steps` backwards, and the losses."""
    stages: list[nn.Module] = [Stage(s) for s in range(num_stages)]
    losses = []
    for step in range(steps):
        losses.append([])
        for x, y in zip(*make_batch(num, step), strict=True):
            for stage in stages:
                x = stage(*x)
            value = loss(x, y)
            value.backward()
            losses[-1].append(value.item())
    return stages, losses


def check_schedule(schedule: Schedule, rank: int, group: Any, overlap: bool) -> int:
    """Two steps and an evaluation; returns the peak of live activations."""
    stages = {s: Stage(s) for s in schedule.stages_of(rank)}
    pipeline = Pipeline(stages, schedule, group, overlap=overlap)
    whole, wanted = serial(schedule.num_stages, 2, schedule.num_micro_batches)
    for step in range(2):
        inputs, targets = make_batch(schedule.num_micro_batches, step)
        for m, value in pipeline.step(inputs, targets, loss).items():
            assert value.item() == pytest.approx(wanted[step][m], rel=1e-12)
        for m, value in pipeline.evaluate(inputs, targets, loss).items():
            assert value.item() == pytest.approx(wanted[step][m], rel=1e-12)
            assert schedule.rank_of(schedule.num_stages - 1, m) == rank
    pipeline.reduce_gradients()
    for number, stage in stages.items():
        for (name, ours), theirs in zip(stage.named_parameters(), whole[number].parameters(), strict=True):
            assert ours.grad is not None and theirs.grad is not None
            difference = float((ours.grad - theirs.grad).norm() / theirs.grad.norm())
            assert difference < 1e-12, f"{schedule.name} stage {number} {name}: {difference}"
    return pipeline.peak_activations


def run_all(rank: int, world: int) -> list[str]:
    done = []
    for ranks in (1, 2, 4):
        group = dist.new_group(list(range(ranks)))
        if rank >= ranks:
            continue
        for name in SCHEDULES:
            for num in (2 * ranks, 2 * ranks + 2):
                schedule = make_schedule(name, ranks, num)
                predicted = simulate(schedule, uniform(schedule.num_stages)).peak_activations[rank]
                assert check_schedule(schedule, rank, group, overlap=num % 4 == 0) == predicted, (name, ranks)
                done.append(name)
        dist.barrier(group=group)
    return done


def test_every_schedule_gives_the_serial_gradients_and_the_simulated_memory() -> None:
    results = run_ranks(4, run_all)
    assert set(results[0]) == set(SCHEDULES)
    assert [len(r) for r in results] == [42, 28, 14, 14]


# -- memory ------------------------------------------------------------------------------------------------------


class Token:
    """Lives as long as the autograd node that holds it."""


class Holding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Token) -> Tensor:
        ctx.token = token
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Keeps(nn.Module):
    """Counts how many of its autograd graphs are alive at each forward."""

    def __init__(self, alive: weakref.WeakSet[Token], peaks: list[int]) -> None:
        super().__init__()
        self.weight = nn.Linear(WIDTH, WIDTH)
        self.alive, self.peaks = alive, peaks

    def forward(self, x: Tensor) -> Tensor:
        token = Token()
        self.alive.add(token)
        self.peaks.append(len(self.alive))
        return Holding.apply(self.weight(x), token)


def measure_memory(rank: int, world: int) -> list[str]:
    done = []
    gc.disable()  # references alone must free an activation
    for name in SCHEDULES:
        schedule = make_schedule(name, world, 8)
        alive: weakref.WeakSet[Token] = weakref.WeakSet()
        peaks: list[int] = []
        stages = {s: Keeps(alive, peaks) for s in schedule.stages_of(rank)}
        pipeline = Pipeline(stages, schedule, defer_weights=False, fill=False)
        inputs = [torch.zeros(2, WIDTH)] * 8
        pipeline.step(inputs, inputs, lambda out, target: (out - target).sum())
        predicted = simulate(schedule, uniform(schedule.num_stages))
        assert max(peaks) == predicted.peak_graphs[rank], name
        assert pipeline.peak_activations == predicted.peak_activations[rank] >= max(peaks), name
        assert not alive, name
        done.append(name)
    return done


def test_what_autograd_really_holds_is_what_the_simulator_says() -> None:
    for world in (2, 4):
        assert run_ranks(world, measure_memory) == [list(SCHEDULES)] * world


# -- several pipelines, shared parameters ------------------------------------------------------------------------


def two_at_once(rank: int, world: int) -> None:
    one, other = make_schedule("dualpipe", 2, 4), make_schedule("zbv", 2, 6)
    first = Pipeline({s: Stage(s) for s in one.stages_of(rank)}, one)
    second = Pipeline({s: Stage(s) for s in other.stages_of(rank)}, other)
    _, wanted = serial(2, 1, 4)
    _, others = serial(4, 1, 6)
    for turn in range(3):
        for pipeline, num, values in ((first, 4, wanted), (second, 6, others)):
            got = pipeline.step(*make_batch(num), loss) if turn < 2 else pipeline.evaluate(*make_batch(num), loss)
            assert all(value.item() == pytest.approx(values[0][m], rel=1e-12) for m, value in got.items())


def test_two_pipelines_with_different_schedules_take_turns_in_one_process() -> None:
    run_ranks(2, two_at_once)


def distance(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


def tied() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    first, last = nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 4, dtype=torch.float64)
    last.weight = first.weight
    return first, last


def train_tied(rank: int, world: int) -> None:
    wanted = tied()
    torch.manual_seed(1)
    inputs = [torch.randn(3, 4, dtype=torch.float64) for _ in range(8)]
    torch.stack([distance(wanted[1](wanted[0](x)), x) for x in inputs]).sum().backward()
    stages = dict(enumerate(tied()))
    pipeline = Pipeline(stages, make_schedule("dualpipe", 2, 8))
    pipeline.step(inputs, inputs, distance)
    pipeline.reduce_gradients()
    for stage, module in stages.items():
        for ours, serial in zip(module.parameters(), wanted[stage].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, serial.grad, rtol=1e-12, atol=1e-15)


def test_a_parameter_of_two_stages_is_summed_once() -> None:
    run_ranks(2, train_tied)


# -- refusals ----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_in_words() -> None:
    schedule = make_schedule("one_f_one_b", 2, 4)
    with pytest.raises(ValueError, match="made for 2 ranks, the group has 1"):
        Pipeline({0: Stage(0)}, schedule)
    single = make_schedule("gpipe", 1, 4)
    with pytest.raises(ValueError, match=r"holds stages \(0,\); got \[1\]"):
        Pipeline({1: Stage(1)}, single)
    with pytest.raises(ValueError, match="4 micro-batches; got 3 inputs and 4 targets"):
        Pipeline({0: Stage(0)}, single).step(make_batch(3)[0], make_batch(4)[1], loss)


def bad_shape(rank: int, world: int) -> str:
    schedule = make_schedule("one_f_one_b", 2, 2)
    module = nn.Linear(3, 5) if rank == 0 else nn.Linear(4, 1)
    pipeline = Pipeline({rank: nn.Sequential(module, nn.Tanh(), nn.Linear(9, 9)) if rank == 0 else module}, schedule)
    with pytest.raises(ShapeError) as caught:
        pipeline.step([torch.zeros(2, 3)] * 2, [0] * 2, loss)
    return str(caught.value)


def test_a_module_that_does_not_fit_is_named_on_every_rank() -> None:
    messages = run_ranks(2, bad_shape)
    assert messages[0] == messages[1]
    assert messages[0].startswith("stage 0 (Sequential) does not give tensors of a known shape on inputs of [2, 3]")


# -- parts -------------------------------------------------------------------------------------------------------


def test_a_buffer_is_taken_again_only_when_nobody_refers_to_its_memory() -> None:
    pool = BufferPool(torch.device("cpu"))
    spec = TensorSpec((4, 3), torch.float32)
    first = pool.take(spec)
    address, view = first.data_ptr(), first[1:]
    del first
    assert pool.take(spec).data_ptr() != address, "a view of it is still alive"
    del view
    assert {pool.take(spec).data_ptr() for _ in range(4)} >= {address}
    leaf = pool.take(spec).requires_grad_()
    held = leaf.data_ptr()
    product = leaf * leaf  # autograd keeps it
    del leaf
    assert held not in {pool.take(spec).data_ptr() for _ in range(9)}
    del product
    assert held in {pool.take(spec).data_ptr() for _ in range(9)}
    assert len(pool) <= 3
    assert pool.take(TensorSpec((4, 3), torch.float64)).dtype is torch.float64


def steps(text: str) -> tuple[Any, ...]:
    return tuple(parse_step(cell) for cell in text.split())


@pytest.mark.parametrize(
    ("row", "idle", "filled"),
    [
        ("0F0 0F1 0I0 0I1 0W0 0W1", {"0I1": 1.0}, "0F0 0F1 0I0 0W0 0I1 0W1"),
        ("0F0 0F1 0I0 0I1 0W0 0W1", {"0I1": 0.9}, "0F0 0F1 0I0 0I1 0W0 0W1"),
        ("0F0 0F1 0F2 0I0 0I1 0I2 0W0 0W1 0W2", {"0I2": 2.5}, "0F0 0F1 0F2 0I0 0I1 0W0 0W1 0I2 0W2"),
        ("0F0 0F1 0I0 0W0 0I1 0W1", {"0I0": 9.0}, "0F0 0F1 0I0 0W0 0I1 0W1"),  # not before its own I
        ("0F0 0F1 0F2 0I0 0B1 0F2 0W0", {"0B1": 9.0}, "0F0 0F1 0F2 0I0 0B1 0F2 0W0"),  # not across a B: sums
        ("0F0 0I0 1I0 1W0 0W0", {"1I0": 9.0}, "0F0 0I0 1I0 1W0 0W0"),  # not across another W
    ],
)
def test_w_is_moved_where_it_fits_and_order_of_sums_stays(row: str, idle: dict[str, float], filled: str) -> None:
    times = {parse_step(step): time for step, time in idle.items()}
    assert fill_idle(steps(row), times, {0: 1.0, 1: 1.0}) == steps(filled)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_any_filling_is_a_valid_schedule_that_holds_no_more(name: str) -> None:
    schedule = make_schedule(name, 4, 12)
    weights = dict.fromkeys(range(schedule.num_stages), 1.0)
    rows = tuple(fill_idle(row, dict.fromkeys(row, 1.5), weights) for row in schedule.steps)
    filled = Schedule(name, 12, schedule.placement, rows)
    validate(filled)
    costs = uniform(schedule.num_stages)
    before, after = simulate(schedule, costs).peak_activations, simulate(filled, costs).peak_activations
    assert all(a <= b for a, b in zip(after, before, strict=True))


def test_the_meter_needs_three_passes_and_gives_up_what_leaves_no_wait() -> None:
    wait, weight = Action(Kind.F, 0, 3), Action(Kind.W, 0, 0)
    meter = IdleMeter()
    for _ in range(3):
        assert meter.idle == {}
        meter.note(wait, waited=1.5, took=1.0, early=False)
        meter.note(weight, waited=0.0, took=1.0, early=False)
    assert (meter.idle, meter.weights) == ({wait: 1.5}, {0: 1.0})
    meter.note(weight, waited=0.0, took=1.0, early=True)
    meter.note(wait, waited=0.5, took=1.0, early=False)
    assert meter.idle == {wait: 1.5}, "half of it is left: the W fits"
    for _ in range(4):
        meter.note(weight, waited=0.0, took=1.0, early=True)
        meter.note(wait, waited=0.0, took=1.0, early=False)
    assert meter.idle[wait] < 1.0, "nothing is left: the message may have come before"


# -- alone -------------------------------------------------------------------------------------------------------


def run_alone(folder: Path, command: Sequence[str]) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_engine_installs_alone_and_runs_the_example(tmp_path: Path) -> None:
    source = tmp_path / "source"
    subprocess.run(["cp", "-r", str(ROOT / "dualpipe"), str(source)], check=True)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", str(tmp_path / "site"), str(source)], check=True, capture_output=True)
    where = run_alone(tmp_path, [sys.executable, "-c", "import dualpipe.pipeline as p; print(p.__file__)"])
    assert where.startswith(str(tmp_path / "site"))
    shown = run_alone(tmp_path, [sys.executable, "-m", "dualpipe", "show", "--schedule", "zbv", "--ranks", "2"])
    assert shown == make_schedule("zbv", 2, 20).to_csv()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    said = run_alone(tmp_path, [*torchrun, str(ROOT / "examples" / "linears.py")])
    assert said.count("equal those of one process") == 2
    assert len((ROOT / "examples" / "linears.py").read_text().splitlines()) < 50


def test_the_names_of_the_package_are_there() -> None:
    import dualpipe

    found: list[Callable[..., Any]] = [getattr(dualpipe, name) for name in dualpipe.__all__]
    assert len(found) == len(set(dualpipe.__all__))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dualpipe.nonsense
