"""A stand-in for DeepEP 2.1.0 without a GPU: its Python signatures, and the same tensors moved by all-gather.

The signatures are those of `ElasticBuffer` in deepseek-ai/DeepEP (commit dd758ca, version 2.1.0), written down as
facts; defaults and keyword names are what tests compare. Where DeepEP is installed, test_deep_ep.py also compares this
file with it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


class ElasticBuffer:
    def __init__(
        self, group, num_bytes=None, num_cpu_bytes=0, num_max_tokens_per_rank=0, hidden=0, num_topk=0,
        use_fp8_dispatch=False, deterministic=False, allow_hybrid_mode=True, allow_multiple_reduction=True,
        prefer_overlap_with_compute=True, sl_idx=3, num_allocated_qps=0, num_cpu_timeout_secs=300,
        num_gpu_timeout_secs=100, explicitly_destroy=False,
    ) -> None:  # fmt: skip
        if num_bytes is None and not (num_max_tokens_per_rank and hidden and num_topk):
            raise AssertionError("give num_bytes, or the MoE settings")
        self.group, self.capacity, self.hidden = group, num_max_tokens_per_rank, hidden

    def dispatch(
        self, x, topk_idx=None, topk_weights=None, cumulative_local_expert_recv_stats=None, num_experts=None,
        num_max_tokens_per_rank=None, expert_alignment=None, num_sms=0, num_qps=0, previous_event=None,
        previous_event_before_epilogue=None, async_with_compute_stream=False, allocate_on_comm_stream=False,
        handle=None, do_handle_copy=True, do_cpu_sync=None, do_expand=False, do_zero_padding=False,
        use_tma_aligned_col_major_sf=False,
    ) -> Any:  # fmt: skip
        if x.dtype is not torch.bfloat16 or x.shape[1] != self.hidden or len(x) > self.capacity:
            raise AssertionError(f"{x.dtype} {tuple(x.shape)}")
        if handle is None:
            if topk_idx.dtype is not torch.int64 or topk_weights.dtype is not torch.float32:
                raise AssertionError("topk_idx is int64, topk_weights float32")
            handle = self._layout(topk_idx, num_experts)
        elif topk_idx is not None or do_cpu_sync or not num_sms:
            raise AssertionError("with a handle: no topk_idx, no CPU sync, and a number of SMs")
        weights = None if topk_weights is None else _gather(topk_weights, self.group)[handle.origin]
        return _gather(x, self.group)[handle.origin], handle.recv_topk_idx, weights, handle, _Event()

    def combine(
        self, x, handle, topk_weights=None, bias=None, num_sms=0, num_qps=0, previous_event=None,
        previous_event_before_epilogue=None, async_with_compute_stream=False, allocate_on_comm_stream=False,
    ) -> Any:  # fmt: skip
        if x.dtype is not torch.bfloat16:
            raise AssertionError(x.dtype)
        home = self._reduce(x, handle).to(torch.bfloat16)
        weights = None
        if topk_weights is not None:
            mine = topk_weights.masked_fill(handle.recv_topk_idx < 0, 0)
            weights = self._reduce(mine, handle)
        return home, weights, _Event()

    def _layout(self, topk_idx: Any, num_experts: int) -> Any:
        rank, share = self.group.rank(), num_experts // self.group.size()
        everyone = _gather(topk_idx, self.group)
        local = (everyone - rank * share).masked_fill((everyone // share) != rank, -1)
        origin = (local >= 0).any(1).nonzero()[:, 0]
        per_expert = [int((local == e).sum()) for e in range(share)]
        return SimpleNamespace(
            num_sms=24, origin=origin, recv_topk_idx=local[origin], tokens=len(topk_idx), total=len(everyone),
            num_recv_tokens_per_expert_list=per_expert,
        )  # fmt: skip

    def _reduce(self, rows: Any, handle: Any) -> Any:
        whole = torch.zeros(handle.total, rows.shape[1]).index_add_(0, handle.origin, rows.float())
        dist.all_reduce(whole, group=self.group)
        return whole[self.group.rank() * handle.tokens :][: handle.tokens]


class _Event:
    def current_stream_wait(self, release_handle: bool = False) -> None:
        raise AssertionError("an event is valid only with async_with_compute_stream")


def _gather(x: Any, group: Any) -> Any:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)
