"""What a rank needs is counted before anything is allocated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dualpipe.schedules import make_schedule
from parallel.mesh import Layout
from training.capacity import build_on_meta, bytes_per_rank, check_capacity, check_sizes
from training.config import Config

CPU = torch.device("cpu")


def test_bytes_are_those_of_parameters_gradients_and_moments() -> None:
    config = Config()
    for pp, ep, zero in ((2, 1, 0), (2, 2, 1), (4, 1, 1)):
        config.optim.zero = zero
        layout, schedule = Layout(8, pp, ep), make_schedule("dualpipe", pp, 8)
        for rank in (0, 7):
            stages = build_on_meta(config, layout, schedule, rank)
            named = [(n, p.numel()) for stage in stages.values() for n, p in stage.named_parameters()]
            routed = sum(count for name, count in named if ".experts." in name)
            dense = sum(count for _, count in named) - routed
            copies, expert_copies = 2 * layout.dp, 2 * layout.dp // ep
            wanted = (dense + routed) * 16.0
            if zero:  # masters and two moments are shared out
                wanted = dense * (8 + 12 / copies) + routed * (8 + 12 / expert_copies)
            assert bytes_per_rank(config, layout, schedule, rank) == pytest.approx(wanted, rel=1e-6)


def test_what_cannot_fit_is_refused_without_allocating() -> None:
    config = Config()
    layout, schedule = Layout(1, 1, 1), make_schedule("dualpipe", 1, 4)
    check_capacity(config, layout, schedule, CPU)
    config.model = replace(config.model, hidden_size=65_536, expert_ffn_size=65_536)
    with pytest.raises(ValueError, match=r"need \d+\.\d GiB, and there are .* optim\.zero=1"):
        check_capacity(config, layout, schedule, CPU)
    config.model = replace(config.model, hidden_size=2**31, expert_ffn_size=2**31)
    with pytest.raises(ValueError, match=r"sizes of model\.\*|need"):
        check_capacity(config, layout, schedule, CPU)
    config.model = replace(config.model, num_heads=2**31 + 1)
    with pytest.raises(ValueError, match=rf"model\.num_heads={2**31 + 1} must be at most"):
        check_sizes(config)
