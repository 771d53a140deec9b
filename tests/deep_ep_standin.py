"""A stand-in for DeepEP without a GPU: the same tensors, moved by all-gather, behind DeepEP's own signatures.

The signatures are read from DeepEP's source by `tests/signatures.py`: of the installed package if there is one, else
of the checkout from which `deep_ep_signatures.json` was made. A call that does not fit them fails, and so does reading
an attribute that DeepEP's handle has not got.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from tests.signatures import read_package, signature


def library() -> dict[str, Any]:
    """The table of DeepEP's signatures."""
    spec = find_spec("deep_ep")
    if spec is None or spec.origin is None:
        return json.loads(Path(__file__).with_name("deep_ep_signatures.json").read_text())
    return read_package(Path(spec.origin).parent, ["ElasticBuffer", "EPHandle"])


TABLE = library()


def bind(method: str, *args: Any, **kwargs: Any) -> SimpleNamespace:
    """The arguments by name, defaults included, as DeepEP's method would see them; TypeError if they do not fit."""
    bound = signature(TABLE, "ElasticBuffer", method).bind(None, *args, **kwargs)
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments)


class Handle:
    """What dispatch returns for combine. Public attributes are DeepEP's; ours start with an underscore."""

    def __init__(self, **attributes: Any) -> None:
        public = {name for name in attributes if not name.startswith("_")}
        if strange := public - set(TABLE["classes"]["EPHandle"]["attributes"]):
            raise AssertionError(f"DeepEP's EPHandle has no {', '.join(sorted(strange))}")
        self.__dict__.update(attributes)


class ElasticBuffer:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = bind("__init__", *args, **kwargs)
        if given.num_bytes is None and not (given.num_max_tokens_per_rank and given.hidden):
            raise AssertionError("give num_bytes, or the MoE settings")
        self.group, self.capacity, self.hidden = given.group, given.num_max_tokens_per_rank, given.hidden
        self.fp8 = given.use_fp8_dispatch

    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        given = bind("dispatch", *args, **kwargs)
        handle = given.handle
        x, scales = given.x if isinstance(given.x, tuple) else (given.x, None)
        if x.dtype is not (torch.float8_e4m3fn if self.fp8 else torch.bfloat16) or not x.is_contiguous():
            raise AssertionError(f"{x.dtype} {x.stride()}")
        if x.shape[1] != self.hidden or len(x) > self.capacity or self.hidden * x.itemsize % 16:
            raise AssertionError(tuple(x.shape))
        if (scales is None) == self.fp8 or (scales is not None and (len(scales) != len(x) or scales.itemsize != 4)):
            raise AssertionError("FP8 comes with scales of four bytes, a row for each token")
        if handle is None:
            if given.topk_idx.dtype is not torch.int64 or given.topk_weights.dtype is not torch.float32:
                raise AssertionError("topk_idx is int64, topk_weights float32")
            handle = self._layout(given.topk_idx, given.num_experts)
        elif given.topk_idx is not None or given.do_cpu_sync or not given.num_sms:
            raise AssertionError("with a handle: no topk_idx, no CPU sync, and a number of SMs")
        rows = _gather(x.view(torch.uint8), self.group)[handle._origin].view(x.dtype)
        if scales is not None:
            rows = rows, _gather(scales, self.group)[handle._origin]
        weights = None if given.topk_weights is None else _gather(given.topk_weights, self.group)[handle._origin]
        return rows, handle._local_idx, weights, handle, _Event()

    def combine(self, *args: Any, **kwargs: Any) -> Any:
        given = bind("combine", *args, **kwargs)
        if given.x.dtype is not torch.bfloat16:
            raise AssertionError(given.x.dtype)
        home = self._reduce(given.x, given.handle).to(torch.bfloat16)
        weights = None
        if given.topk_weights is not None:
            mine = given.topk_weights.masked_fill(given.handle._local_idx < 0, 0)
            weights = self._reduce(mine, given.handle)
        return home, weights, _Event()

    def _layout(self, topk_idx: Any, num_experts: int) -> Any:
        rank, share = self.group.rank(), num_experts // self.group.size()
        everyone = _gather(topk_idx, self.group)
        local = (everyone - rank * share).masked_fill((everyone // share) != rank, -1)
        origin = (local >= 0).any(1).nonzero()[:, 0]
        per_expert = [int((local == e).sum()) for e in range(share)]
        return Handle(
            num_sms=24, num_recv_tokens_per_expert_list=per_expert, topk_idx=topk_idx,
            _origin=origin, _local_idx=local[origin], _tokens=len(topk_idx), _total=len(everyone),
        )  # fmt: skip

    def _reduce(self, rows: Any, handle: Any) -> Any:
        whole = torch.zeros(handle._total, rows.shape[1]).index_add_(0, handle._origin, rows.float())
        dist.all_reduce(whole, group=self.group)
        return whole[self.group.rank() * handle._tokens :][: handle._tokens]


class _Event:
    def current_stream_wait(self, release_handle: bool = False) -> None:
        raise AssertionError("an event is valid only with async_with_compute_stream")


def _gather(x: Any, group: Any) -> Any:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)
