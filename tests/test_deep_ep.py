"""The DeepEP adapter, without a GPU: every call fits the signatures in its source, and moves what all_to_all moves."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.fp8.reference import ReferenceBackend
from parallel.deep_ep import DeepEPDispatcher, deep_ep_dispatcher
from parallel.dispatch import RoutedDispatcher
from parallel.expert_groups import create_expert_groups
from parallel.rows import Fp8Rows
from tests.deep_ep_standin import TABLE, ElasticBuffer, Handle, bind
from tests.signatures import read_package, signature
from tests.spawn import run_ranks
from tests.test_dispatch import round_trip

CONFIG = ModelConfig(hidden_size=272, num_experts=8, experts_per_token=3)


def check(rank: int, world: int, fp8: bool) -> bool:
    groups = create_expert_groups([list(range(world))], timedelta(seconds=60))
    assert groups is not None
    share = CONFIG.num_experts // world
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(6, CONFIG.hidden_size, generator=generator).to(torch.bfloat16)
    scores = torch.rand(6, CONFIG.num_experts, generator=generator)
    experts_TK = scores.argsort(1)[:, : CONFIG.experts_per_token]
    gates = torch.rand(experts_TK.shape, generator=generator)
    rows = Fp8Rows(ReferenceBackend(), torch.bfloat16) if fp8 else None
    ours = DeepEPDispatcher(ElasticBuffer, groups, share, CONFIG, rows)
    plain = RoutedDispatcher(groups, share, rows)
    for _ in range(2):  # the buffer is made once
        found, wanted = (round_trip(d, experts_TK, x, gates, rank * share) for d in (ours, plain))
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype
            assert torch.allclose(a.float(), b.float(), rtol=3e-2, atol=3e-2)
    with pytest.raises(ValueError, match="6 tokens per rank; got 7"):
        ours.buffer(7)
    with pytest.raises(ValueError, match="precision=bf16 or fp8"):
        round_trip(ours, experts_TK, x.float(), gates, rank * share)
    for found, wanted in zip(*(travelled(d, experts_TK, x, gates) for d in (ours, plain)), strict=True):
        assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)
    return True


def travelled(dispatcher: Any, experts_TK: Tensor, x: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """What arrives of x at the experts, forward and as a gradient."""
    exchange = dispatcher.open()
    (table,) = exchange.counts.start(experts_TK).wait()
    rows, *_ = exchange.dispatch.start(x, gates, experts_TK, table).wait()
    return rows, exchange.combine.start_backward(x).wait()[0]


@pytest.mark.parametrize("fp8", [False, True])
def test_the_adapter_gives_what_all_to_all_gives(fp8: bool) -> None:
    assert all(run_ranks(2, check, fp8))


@pytest.mark.parametrize(("fp8", "unit"), [(False, 8), (True, 16)])
def test_a_row_must_suit_the_library(fp8: bool, unit: int) -> None:
    rows = Fp8Rows(ReferenceBackend(), torch.bfloat16) if fp8 else None
    config = ModelConfig(hidden_size=unit + unit // 2)
    with pytest.raises(ValueError, match=f"hidden_size={config.hidden_size} to be a multiple of {unit}"):
        DeepEPDispatcher(ElasticBuffer, None, 4, config, rows)  # type: ignore[arg-type]


def check_missing(rank: int, world: int) -> bool:
    groups = create_expert_groups([list(range(world))], timedelta(seconds=60))
    with pytest.raises(ValueError, match=r"needs DeepEP 2\.1 or later"):
        deep_ep_dispatcher(groups, 4, CONFIG, None)
    return True


def test_without_the_library_the_message_says_what_to_do() -> None:
    assert isinstance(deep_ep_dispatcher(None, 8, CONFIG, None), RoutedDispatcher)
    try:
        import deep_ep  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        assert all(run_ranks(2, check_missing))


def test_the_library_exports_what_we_import_and_returns_as_many_values_as_we_take() -> None:
    assert "ElasticBuffer" in TABLE["exports"]
    methods = TABLE["classes"]["ElasticBuffer"]["methods"]
    assert (methods["dispatch"]["values"], methods["combine"]["values"]) == (5, 3)


@pytest.mark.parametrize(
    ("method", "wrong"),
    [("dispatch", {"topk_ids": None}), ("combine", {"handle": None, "weights": None}), ("__init__", {"tokens": 6})],
)
def test_a_call_that_does_not_fit_the_library_fails(method: str, wrong: dict[str, None]) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument '(topk_ids|weights|tokens)'"):
        bind(method, None, **wrong)
    with pytest.raises(TypeError, match="missing a required argument"):
        bind(method)
    with pytest.raises(AssertionError, match="EPHandle has no num_tokens"):
        Handle(num_tokens=1)


SOURCE = """
import torch
class Buffer:
    def __init__(self, group: "Group", size: int = 2 * 3, *, flag: bool = True) -> None:
        self.group, self._hidden = group, size
        self.size: int = size
    @staticmethod
    def hint(dtype: torch.dtype = torch.bfloat16, *rest, **others) -> Tuple[Tensor, Tuple[int, int]]: ...
    def _private(self): ...
"""


def test_signatures_are_read_from_source(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("from .a import Buffer, Other as Renamed\n__version__ = '7.1'\n")
    (tmp_path / "a.py").write_text(SOURCE)
    table = read_package(tmp_path, ["Buffer"])
    assert (table["version"], table["exports"]) == ("7.1", ["Buffer", "Renamed"])
    assert table["classes"]["Buffer"] == {
        "attributes": ["group", "size"],
        "methods": {
            "__init__": {"parameters": "self, group, size=..., *, flag=True", "values": None},
            "hint": {"parameters": "dtype=..., *rest, **others", "values": 2},
        },
    }
    assert str(signature(table, "Buffer", "__init__")) == "(self, group, size=Ellipsis, *, flag=True)"
    with pytest.raises(ValueError, match="class Missing 0 times"):
        read_package(tmp_path, ["Missing"])
