"""The DeepEP adapter, without a GPU: every call fits DeepEP's signatures and moves what all_to_all moves."""

from __future__ import annotations

import inspect
from datetime import timedelta

import pytest
import torch

from model.config import ModelConfig
from parallel.deep_ep import DeepEPDispatcher, deep_ep_dispatcher
from parallel.dispatch import RoutedDispatcher
from parallel.expert_groups import create_expert_groups
from tests.deep_ep_standin import ElasticBuffer
from tests.spawn import run_ranks
from tests.test_dispatch import round_trip

CONFIG = ModelConfig(hidden_size=16, num_experts=8, experts_per_token=3)


def check(rank: int, world: int) -> bool:
    groups = create_expert_groups([list(range(world))], timedelta(seconds=60))
    assert groups is not None
    share = CONFIG.num_experts // world
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(6, CONFIG.hidden_size, generator=generator).to(torch.bfloat16)
    scores = torch.rand(6, CONFIG.num_experts, generator=generator)
    experts_TK = scores.argsort(1)[:, : CONFIG.experts_per_token]
    gates = torch.rand(experts_TK.shape, generator=generator)
    ours = DeepEPDispatcher(ElasticBuffer, groups, share, CONFIG)
    plain = RoutedDispatcher(groups, share)
    for _ in range(2):  # the buffer is made once
        found, wanted = (round_trip(d, experts_TK, x, gates, rank * share) for d in (ours, plain))
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype
            assert torch.allclose(a.float(), b.float(), rtol=3e-2, atol=3e-2)
    with pytest.raises(ValueError, match="6 tokens per rank; got 7"):
        ours.buffer(7)
    with pytest.raises(ValueError, match="precision=bf16"):
        round_trip(ours, experts_TK, x.float(), gates, rank * share)
    return True


def test_the_adapter_gives_what_all_to_all_gives() -> None:
    assert all(run_ranks(2, check))


def check_missing(rank: int, world: int) -> bool:
    groups = create_expert_groups([list(range(world))], timedelta(seconds=60))
    with pytest.raises(ValueError, match=r"needs DeepEP 2\.1 or later"):
        deep_ep_dispatcher(groups, 4, CONFIG)
    return True


def test_without_the_library_the_message_says_what_to_do() -> None:
    assert isinstance(deep_ep_dispatcher(None, 8, CONFIG), RoutedDispatcher)
    try:
        import deep_ep  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        assert all(run_ranks(2, check_missing))


@pytest.mark.parametrize("method", ["__init__", "dispatch", "combine"])
def test_the_stand_in_has_the_signatures_of_the_library(method: str) -> None:
    deep_ep = pytest.importorskip("deep_ep", reason="DeepEP is not installed here", exc_type=ImportError)
    ours, theirs = (inspect.signature(getattr(cls, method)) for cls in (ElasticBuffer, deep_ep.ElasticBuffer))
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]
