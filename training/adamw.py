"""AdamW over flat parameters: torch's own with FP32 moments, and one whose moments are BF16 (report 3.3.3).

Moments in BF16 need stochastic rounding. With β2 = 0.95 one step moves the second moment by at most 5 % of itself, and
to nearest a change below half a unit in the last place (2⁻⁹ of the value) would be lost every time: the moment would
stick up to 4 % away from where it should be. Rounded up or down at random, with the probability of each such that the
expectation is exact, errors average out. A single rounding is off by less than one unit in the last place,
r = 2⁻⁷ of the value at most, with a standard deviation of at most r/2; through the moving average that adds up to at
most r / (2·√(1−β²)): 0.9 % of the first moment (β1 = 0.9) and 1.3 % of the second, hence 0.7 % of its square root.
The update itself is made from the exact moments of this step, before they are rounded.

The random bits are a function of (seed, update, bucket), so a resumed run on the same layout is bit-equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from parallel.update import ParamGroup
from training.order import mix

CHUNK = 1 << 20  # elements worked on at a time: bounds the FP32 temporaries


class AdamW(torch.optim.AdamW):
    """torch's AdamW, fused, whose state can be made before the first step."""

    def __init__(self, groups: list[ParamGroup], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, betas=betas, eps=eps, fused=True)

    def init_state(self) -> None:
        for _, parameter in _parameters(self):
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW with moments in BF16, stochastically rounded, or in another type, as they are; parameters are FP32."""

    def __init__(
        self, groups: list[ParamGroup], betas: tuple[float, float], eps: float, seed: int,
        moments: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.seed, self.moments = seed, moments

    def init_state(self) -> None:
        for _, parameter in _parameters(self):
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter, dtype=self.moments, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, dtype=self.moments, requires_grad=False),
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self.step_group(group)

    def step_group(self, group: ParamGroup) -> None:
        for parameter in group["params"]:
            state = self.state[parameter]
            state["step"] += 1
            generator = torch.Generator(parameter.device)
            generator.manual_seed(mix(self.seed, int(state["step"]), group["number"]) >> 1)
            tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            for weight, grad, first, second in zip(*(t.split(CHUNK) for t in tensors), strict=True):
                _update(weight, grad, first, second, group, float(state["step"]), generator)


def _update(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, group: ParamGroup, step: float,
    generator: torch.Generator,
) -> None:  # fmt: skip
    beta1, beta2 = group["betas"]
    first = exp_avg.to(grad.dtype).lerp_(grad, 1 - beta1)
    second = exp_avg_sq.to(grad.dtype).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**step))
    rounds = exp_avg.dtype == torch.bfloat16
    exp_avg.copy_(round_stochastically(first, generator) if rounds else first)
    exp_avg_sq.copy_(round_stochastically(second, generator) if rounds else second)


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """FP32 → BF16, up or down at random so that the expectation is x. Overwrites x.

    BF16 is the upper half of FP32's bits: adding a uniform 16-bit number to the lower half carries into the upper one
    with just the right probability.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits = x.view(torch.int32).add_(noise).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).to(torch.bfloat16)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[ParamGroup, Tensor]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield group, parameter
