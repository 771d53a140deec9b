"""One transformer layer, cut into segments (report Fig. 4).

    dense layer   attention → mlp
    MoE layer     attention → counts → router → dispatch → shared → experts → combine
                  compute     comm     compute  comm       compute  compute   comm

The residual stream is handed on as a tuple of names whose sum it is: the sum is made by the next compute segment,
so combine's result is not awaited before it is needed. `shared` stands between dispatch and experts, and so runs
under the dispatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import AttentionContext, LatentAttention
from model.config import ModelConfig
from model.functional import make_kernels
from model.layers import GroupedLinear, Linear, RMSNorm, Toolbox
from model.protocols import CommOp
from model.router import Router

Residual = tuple[str, ...]


class SegmentWriter:
    """Collects a stage's segments: (name, is communication, reads, writes, work)."""

    def __init__(self) -> None:
        self.items: list[tuple[str, bool, tuple[str, ...], tuple[str, ...], Any]] = []

    def compute(self, name: str, reads: tuple[str, ...], writes: tuple[str, ...], fn: Callable[..., Any]) -> None:
        self.items.append((name, False, reads, writes, fn))

    def communicate(self, name: str, reads: tuple[str, ...], writes: tuple[str, ...], op: CommOp) -> None:
        self.items.append((name, True, reads, writes, op))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)); gate and up are one product. `name`: mlp or shared."""

    def __init__(self, hidden: int, ffn: int, tools: Toolbox, name: str) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * ffn, tools, f"{name}_gate_up")
        self.down = Linear(ffn, hidden, tools, f"{name}_down")
        self.kernels = make_kernels(tools.compile, tools.cpp)

    def forward(self, x: Tensor) -> Tensor:
        return self.down.of_swiglu(self.gate_up(x), self.kernels)


class Experts(nn.Module):
    """The routed experts of this rank, by their numbers in the layer. Parameters [local experts, ...]."""

    def __init__(self, config: ModelConfig, experts: Sequence[int], tools: Toolbox) -> None:
        super().__init__()
        self.numbers = tuple(experts)
        count, hidden, ffn = len(experts), config.hidden_size, config.expert_ffn_size
        self.gate_up = GroupedLinear(count, hidden, 2 * ffn, tools, "experts_gate_up")
        self.down = GroupedLinear(count, ffn, hidden, tools, "experts_down")
        self.kernels = make_kernels(tools.compile, tools.cpp)

    def forward(self, x_RD: Tensor, gates_R: Tensor, counts: list[int]) -> Tensor:
        """Each row through its expert, already weighted by its gate, so that combine only has to add."""
        return self.down.of_swiglu(self.gate_up(x_RD, counts), gates_R, counts, self.kernels)


class Layer(nn.Module):
    """index: the layer's global number; experts: the range of slots on this rank; dense layers ignore it.

    Slot s of a layer holds expert s, unless `tools.placement` gives another order.
    label   what its segments are called: the index if not given
    """

    slot_E: Tensor

    def __init__(
        self, config: ModelConfig, index: int, experts: range, tools: Toolbox, label: str | None = None
    ) -> None:
        super().__init__()
        self.label = str(index) if label is None else label
        self.tools = tools
        self.is_moe = index >= config.num_dense_layers
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, tools)
        self.attention = LatentAttention(config, tools)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, tools)
        if self.is_moe:
            self.router = Router(config, tools)
            order = tools.placement.get(index, range(config.num_experts))
            self.experts = Experts(config, order[experts.start : experts.stop], tools)
            slot_E = torch.empty(config.num_experts, dtype=torch.int64, device=tools.device)
            slot_E[list(order)] = torch.arange(config.num_experts, device=tools.device)
            self.register_buffer("slot_E", slot_E, persistent=False)
            self.shared = (
                MLP(config.hidden_size, config.num_shared_experts * config.expert_ffn_size, tools, "shared")
                if config.num_shared_experts
                else None
            )
        else:
            self.mlp = MLP(config.hidden_size, config.dense_ffn_size, tools, "mlp")

    def write(self, out: SegmentWriter, residual: Residual, context: AttentionContext) -> Residual:
        """Append the layer's segments; returns the names whose sum is its output."""
        return (self._write_moe if self.is_moe else self._write_dense)(out, residual, context)

    def _attend(self, parts: tuple[Tensor, ...], context: AttentionContext) -> Tensor:
        h_BSD = add(*parts)
        return h_BSD + self.attention(self.attention_norm(h_BSD), context)

    def _write_dense(self, out: SegmentWriter, residual: Residual, context: AttentionContext) -> Residual:
        at, done = f"{self.label}.h", f"{self.label}.out"
        out.compute(f"{self.label}.attention", residual, (at,), lambda *parts: self._attend(parts, context))
        out.compute(f"{self.label}.mlp", (at,), (done,), lambda h: h + self.mlp(self.mlp_norm(h)))
        return (done,)

    def _write_moe(self, out: SegmentWriter, residual: Residual, context: AttentionContext) -> Residual:
        def name(value: str) -> str:
            return f"{self.label}.{value}"

        def attend_and_choose(*parts: Tensor) -> tuple[Any, ...]:
            h_BSD = self._attend(parts, context)
            x_TD = self.mlp_norm(h_BSD).flatten(0, 1)
            scores_TE, experts_TK = self.router.choose(x_TD)
            return h_BSD, x_TD, scores_TE, (experts_TK, len(h_BSD)), self.slot_E[experts_TK]

        def weigh(scores_TE: Tensor, choice: tuple[Tensor, int]) -> Tensor:
            gates_TK, _, counts_C = self.router.weigh(scores_TE, *choice, context.sequence_scale)
            self.router.record(counts_C)
            return gates_TK

        exchange = self.tools.dispatcher.open()
        h, x, gates, chosen, scores, choice = (name(v) for v in ("h", "x", "gates", "chosen", "scores", "choice"))
        rows, row_gates, counts, y, shared = (name(v) for v in ("rows", "row_gates", "counts", "y", "shared"))
        sizes = name("sizes")
        out.compute(name("attention"), residual, (h, x, scores, choice, chosen), attend_and_choose)
        out.communicate(name("counts"), (chosen,), (sizes,), exchange.counts)
        out.compute(name("router"), (scores, choice), (gates,), weigh)
        out.communicate(name("dispatch"), (x, gates, chosen, sizes), (rows, row_gates, counts), exchange.dispatch)
        if self.shared is not None:
            out.compute(name("shared"), (x,), (shared,), self.shared)
        out.compute(name("experts"), (rows, row_gates, counts), (name("weighted"),), self.experts)
        out.communicate(name("combine"), (name("weighted"),), (y,), exchange.combine)
        return (h, y) if self.shared is None else (h, shared, y)


def add(first: Tensor, *others: Tensor) -> Tensor:
    """The sum of the parts of a residual stream; parts of shape [T, D] are brought to the first one's."""
    for other in others:
        first = first + other.view_as(first)
    return first
