"""Dispatch backends by name (`parallel.dispatch=`). A new one is one file, and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from model.config import ModelConfig
from model.precision import Precision
from model.protocols import Dispatcher
from parallel.deep_ep import deep_ep_dispatcher
from parallel.dispatch import RoutedDispatcher
from parallel.expert_groups import ExpertGroups, split_nodes
from parallel.mesh import Layout
from parallel.rows import Fp8Rows


@dataclass(frozen=True)
class Backend:
    """make(groups, experts per rank, model, precision); `uses_nodes`: it wants groups inside and across nodes."""

    make: Callable[[ExpertGroups | None, int, ModelConfig, Precision], Dispatcher]
    uses_nodes: bool = False
    needs_cuda: bool = False


def _routed(groups: ExpertGroups | None, share: int, config: ModelConfig, precision: Precision) -> Dispatcher:
    return RoutedDispatcher(groups, share, _fp8_rows(precision))


def _deep_ep(groups: ExpertGroups | None, share: int, config: ModelConfig, precision: Precision) -> Dispatcher:
    return deep_ep_dispatcher(groups, share, config, _fp8_rows(precision))


def _fp8_rows(precision: Precision) -> Fp8Rows | None:
    return None if precision.wire is None else Fp8Rows(precision.wire, precision.dtype)


DISPATCHERS: Mapping[str, Backend] = MappingProxyType(
    {
        "all_to_all": Backend(_routed),
        "hierarchical": Backend(_routed, uses_nodes=True),
        "deep_ep": Backend(_deep_ep, needs_cuda=True),
    }
)


def check_dispatch(name: str, layout: Layout, ranks_per_node: int, precision: str, device: str) -> int | None:
    """What the mesh needs to know of nodes for this backend: ranks per node, or None.

    Raises ValueError, naming the override that mends it, if the backend is unknown or cannot work here.
    """
    if name not in DISPATCHERS:
        raise ValueError(f"parallel.dispatch={name!r} is unknown; choose one of {', '.join(DISPATCHERS)}")
    backend = DISPATCHERS[name]
    if backend.needs_cuda and (device != "cuda" or precision not in ("bf16", "fp8")):
        raise ValueError(
            f"parallel.dispatch={name} needs an NVIDIA GPU and precision=bf16 or fp8, not {device} and {precision}; "
            f"use parallel.dispatch=all_to_all or hierarchical"
        )
    if not backend.uses_nodes or layout.ep == 1:
        return None
    split_nodes(layout.ep, layout.dp_per_node(ranks_per_node))
    return ranks_per_node
