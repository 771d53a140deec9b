"""Expert dispatch through DeepEP (github.com/deepseek-ai/DeepEP, 2.1), for NVIDIA GPUs from Hopper on.

DeepEP's kernels send a token once to each node and spread it inside, and overlap with compute on few SMs. This adapter
calls `ElasticBuffer.dispatch` and `combine` on the communication stream (`dualpipe/lanes.py`), which waits for them by
itself, so none of DeepEP's own events are asked for. DeepEP exchanges sizes itself, so `counts` has nothing to do.

    dispatch            one row per received token with its local experts; we make one per (token, expert), sorted
    combine             we add up a token's rows, DeepEP adds up over ranks (BF16)
    backward            dispatch' = combine of gradients with those of the gates, combine' = dispatch along the handle

With FP8 rows both dispatches carry E4M3 and FP32 scales, as a tuple; combine is BF16 in any case.

Not run on a GPU so far: tests/test_deep_ep.py runs the adapter on a stand-in that moves real tensors, and binds every
call to the signatures in DeepEP's own source (2.1.0, or the installed version).

Shapes as in `dispatch.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.protocols import Exchange
from parallel.dispatch import Promise, RoutedDispatcher
from parallel.expert_groups import ExpertGroups
from parallel.rows import Fp8Rows

ROW_BYTES = 16  # DeepEP moves rows of a multiple of this


def deep_ep_dispatcher(groups: ExpertGroups | None, share: int, config: ModelConfig, rows: Fp8Rows | None) -> Any:
    """Raises ValueError if DeepEP is not installed. rows: how vectors travel to the experts (None: in BF16)."""
    if groups is None:
        return RoutedDispatcher(None, share)  # one rank: nothing travels
    try:
        from deep_ep import ElasticBuffer
    except ImportError as error:
        raise ValueError(
            "parallel.dispatch=deep_ep needs DeepEP 2.1 or later, built from source on a machine with an NVIDIA GPU "
            f"(github.com/deepseek-ai/DeepEP): {error}; or use parallel.dispatch=hierarchical"
        ) from error
    return DeepEPDispatcher(ElasticBuffer, groups, share, config, rows)


class DeepEPDispatcher:
    """Opens exchanges over one buffer, made at the first dispatch for as many tokens as that has.

    Raises ValueError for a hidden size that DeepEP's rows cannot have.
    """

    def __init__(
        self,
        buffer_type: Any,
        groups: ExpertGroups,
        experts_per_rank: int,
        config: ModelConfig,
        rows: Fp8Rows | None = None,
    ) -> None:
        unit = ROW_BYTES // (1 if rows else 2)
        if config.hidden_size % unit:
            raise ValueError(
                f"parallel.dispatch=deep_ep needs model.hidden_size={config.hidden_size} to be a multiple of {unit}; "
                "or use parallel.dispatch=hierarchical"
            )
        self.rows = rows
        self._buffer_type = buffer_type
        self.groups = groups
        self.config = config
        self.experts_per_rank = experts_per_rank
        self._buffer: Any = None
        self._capacity = 0

    def open(self) -> Exchange:
        dispatch = _Dispatch(self)
        return Exchange(_NoCounts(), dispatch, _Combine(dispatch))

    def buffer(self, tokens: int) -> Any:
        """The buffer for that many tokens per rank, the same number on every rank."""
        if self._buffer is None:
            self._capacity = tokens
            self._buffer = self._buffer_type(
                self.groups.whole,
                num_max_tokens_per_rank=tokens,
                hidden=self.config.hidden_size,
                num_topk=self.config.experts_per_token,
                use_fp8_dispatch=self.rows is not None,
                deterministic=True,
            )
        if tokens > self._capacity:
            raise ValueError(f"DeepEP's buffer was made for {self._capacity} tokens per rank; got {tokens}")
        return self._buffer

    def pack(self, x_TD: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """As DeepEP's dispatch takes it: BF16, or E4M3 and its scales."""
        if self.rows is None:
            return x_TD.contiguous()
        tiles = self.rows.quantize(x_TD)
        return tiles.values.contiguous(), tiles.scales

    def unpack(self, x_MD: Tensor | tuple[Tensor, Tensor], source_R: Tensor) -> Tensor:
        """The rows source_R of what dispatch has returned, in BF16."""
        if isinstance(x_MD, Tensor) or self.rows is None:
            return x_MD[source_R]
        values, scales = x_MD
        return self.rows.restore(values.view(torch.uint8)[source_R], scales[source_R])


class _NoCounts:
    start_backward = None

    def start(self, experts_TK: Tensor) -> Promise:
        return Promise(lambda: (None,))


class _Dispatch:
    def __init__(self, dispatcher: DeepEPDispatcher) -> None:
        self.dispatcher = dispatcher
        self.handle: Any = None
        self.received: tuple[int, ...] = (0, 0)
        self._rows: tuple[Tensor, Tensor] | None = None

    def start(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor, sizes: None) -> Promise:
        """Raises ValueError for anything but BF16: that is what DeepEP's combine carries."""
        if x_TD.dtype is not torch.bfloat16:
            raise ValueError(f"DeepEP carries bfloat16, got {x_TD.dtype}; use precision=bf16 or fp8")
        dispatcher = self.dispatcher
        x_MD, experts_MK, gates_MK, self.handle, _ = dispatcher.buffer(len(x_TD)).dispatch(
            dispatcher.pack(x_TD),
            topk_idx=experts_TK.to(torch.int64),
            topk_weights=gates_TK.float(),
            num_experts=dispatcher.experts_per_rank * dispatcher.groups.size,
            do_cpu_sync=True,
        )

        def finish() -> tuple[Any, ...]:
            counts = list(self.handle.num_recv_tokens_per_expert_list)
            share = dispatcher.experts_per_rank
            order_R = experts_MK.masked_fill(experts_MK < 0, share).flatten().argsort(stable=True)[: sum(counts)]
            slots = experts_MK.shape[1]
            source_R, slot_R = torch.div(order_R, slots, rounding_mode="floor"), order_R % slots
            self.received, self._rows = tuple(experts_MK.shape), (source_R, slot_R)
            return dispatcher.unpack(x_MD, source_R), gates_MK[source_R, slot_R].to(gates_TK.dtype), counts

        return Promise(finish)

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """source_R, slot_R."""
        if self._rows is None:
            raise RuntimeError("combine, or a backward, was asked for before dispatch has finished")
        return self._rows

    def gather(self, rows_RD: Tensor) -> Tensor:
        return rows_RD.new_zeros(self.received[0], rows_RD.shape[1]).index_add_(0, self.rows[0], rows_RD)

    def combine(self, rows_RD: Tensor, gates_MK: Tensor | None = None) -> Promise:
        buffer = self.dispatcher.buffer(0)
        home_TD, gates_TK, _ = buffer.combine(self.gather(rows_RD), self.handle, topk_weights=gates_MK)
        return Promise(lambda: (home_TD, gates_TK))

    def start_backward(self, dx_RD: Tensor, dgates_R: Tensor, _: None) -> Promise:
        source_R, slot_R = self.rows
        dgates_MK = dgates_R.new_zeros(self.received, dtype=torch.float32)
        dgates_MK[source_R, slot_R] = dgates_R.float()
        pending, dtype = self.combine(dx_RD, dgates_MK), dgates_R.dtype

        def finish() -> tuple[Any, ...]:
            dx_TD, dgates_TK = pending.wait()
            return dx_TD, dgates_TK.to(dtype), None, None

        return Promise(finish)


class _Combine:
    def __init__(self, dispatch: _Dispatch) -> None:
        self.dispatch = dispatch

    def start(self, y_RD: Tensor) -> Promise:
        pending = self.dispatch.combine(y_RD)
        return Promise(lambda: pending.wait()[:1])

    def start_backward(self, dy_TD: Tensor) -> Promise:
        dispatch, dispatcher = self.dispatch, self.dispatch.dispatcher
        rows = dispatcher.pack(dy_TD.flatten(0, -2))
        # Without num_experts DeepEP cannot choose a number of SMs: give it the one of the forward.
        dy_MD, *_ = dispatcher.buffer(0).dispatch(rows, handle=dispatch.handle, num_sms=dispatch.handle.num_sms)
        return Promise(lambda: (dispatcher.unpack(dy_MD, dispatch.rows[0]),))
