"""Stages that people really write: in-place first layers, complex numbers, frozen parts, views; and no losses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualpipe.pipeline import Pipeline
from dualpipe.runtime import PipelineError
from dualpipe.schedules import make_schedule
from tests.spawn import run_ranks

WIDTH = 4


class Rotate(nn.Module):
    """Works on complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.linspace(0, 1, WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x if x.is_complex() else x.to(torch.complex128)) * torch.polar(torch.ones_like(self.angle), self.angle)


class Transposed(nn.Module):
    """Hands on a view that is not contiguous, and its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x).T, x


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.linear(left.T + right)


def linear(frozen: bool = False) -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, dtype=torch.float64).requires_grad_(not frozen)


STAGES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "in place": (linear, lambda: nn.Sequential(nn.ReLU(inplace=True), linear())),
    "complex": (Rotate, Rotate),
    "a view and the input": (Transposed, Joined),
    "the first stage frozen": (lambda: linear(frozen=True), linear),
    "the last stage frozen": (linear, lambda: linear(frozen=True)),
    "nothing to compute": (linear, nn.Identity),
}


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().square().sum()


def run_stages(rank: int, world: int) -> None:
    for title, makers in STAGES.items():
        torch.manual_seed(0)
        whole = [make() for make in makers]
        inputs = [torch.randn(2 + m % 3, WIDTH, dtype=torch.float64) for m in range(4)]
        for name in ("dualpipe", "one_f_one_b", "zb1p"):
            schedule = make_schedule(name, 2, 4)
            stages = {s: copy.deepcopy(whole[s]) for s in schedule.stages_of(rank)}
            pipeline = Pipeline(stages, schedule)
            got = pipeline.step(inputs, [torch.ones(WIDTH)] * 4, loss)
            pipeline.reduce_gradients()
            serial = copy.deepcopy(whole)
            for m, x in enumerate(inputs):
                middle = serial[0](x)
                value = loss(serial[1](*middle) if isinstance(middle, tuple) else serial[1](middle), torch.ones(WIDTH))
                value.backward()
                if m in got:
                    torch.testing.assert_close(got[m], value.detach(), rtol=1e-12, atol=0)
            for s, stage in stages.items():
                for ours, theirs in zip(stage.parameters(), serial[s].parameters(), strict=True):
                    assert (ours.grad is None) == (theirs.grad is None), (title, name)
                    if theirs.grad is not None:
                        torch.testing.assert_close(
                            ours.grad, theirs.grad, rtol=1e-11, atol=1e-13, msg=f"{title} {name}"
                        )


def test_odd_stages_give_the_serial_gradients() -> None:
    run_ranks(2, run_stages)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda output, target: output, r"must return one number; it returned a tensor of \[2, 4\]"),
        (lambda output, target: 1.0, "must return a tensor; it returned a float"),
        (lambda output, target: output.sum().detach(), "nothing to learn"),
    ],
)
@pytest.mark.parametrize("name", ["gpipe", "dualpipe"])
def test_a_loss_that_is_none_is_refused(name: str, wrong: Callable[[Any, Any], Any], message: str) -> None:
    pipeline = Pipeline({0: linear()}, make_schedule(name, 1, 2))
    with pytest.raises(PipelineError, match=r"PP rank 0 failed in \(?0F") as caught:
        pipeline.step([torch.ones(2, 4, dtype=torch.float64)] * 2, [0, 0], wrong)
    with pytest.raises((TypeError, ValueError), match=message):
        raise caught.value.__cause__ or AssertionError("no cause")
    pipeline.step([torch.ones(2, 4, dtype=torch.float64)] * 2, [0, 0], lambda output, target: output.sum())
