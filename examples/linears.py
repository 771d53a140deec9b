"""A plain stack of Linears under DualPipe on two processes; its gradients equal those of one process.

torchrun --nproc-per-node=2 examples/linears.py
"""

import torch
import torch.distributed as dist
from torch import nn

from dualpipe import Pipeline, make_schedule

MICRO_BATCHES, WIDTH = 8, 32


def make_stage(number: int) -> nn.Module:
    torch.manual_seed(number)  # a stage lives on two ranks: the same weights on both
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).double()


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(100)
    inputs, targets = torch.randn(2, MICRO_BATCHES, 16, WIDTH, dtype=torch.float64)

    schedule = make_schedule("dualpipe", ranks, MICRO_BATCHES)
    stages = {number: make_stage(number) for number in schedule.stages_of(rank)}
    pipeline = Pipeline(stages, schedule)
    pipeline.step(list(inputs), list(targets), loss)
    pipeline.reduce_gradients()

    whole = nn.Sequential(*(make_stage(number) for number in range(schedule.num_stages)))
    sum(loss(whole(x), y) for x, y in zip(inputs, targets, strict=True)).backward()
    for number, stage in stages.items():
        for ours, serial in zip(stage.parameters(), whole[number].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, serial.grad, rtol=1e-12, atol=1e-15)
    print(f"rank {rank}: the gradients of stages {sorted(stages)} equal those of one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
