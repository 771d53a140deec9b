"""A contiguous slice of the model: the embedding if it is the first, layers, the head and loss if it is the last.

Implements the stage contract of `dualpipe/stage.py` without importing it: the segment and spec types come in
through `SegmentTypes`. The whole model is the stage that is both first and last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.attention import AttentionContext
from model.batch import MicroBatch
from model.config import ModelConfig
from model.layer import Layer, SegmentWriter, add
from model.layers import Embedding, Linear, RMSNorm, Toolbox
from model.loss import token_loss
from model.rope import rotation
from model.router import Router


class SegmentTypes(Protocol):
    """Constructors of the engine's types: `dualpipe.stage` is one such object."""

    def compute(self, name: str, reads: Sequence[str], writes: Sequence[str], fn: Any) -> Any: ...

    def communicate(self, name: str, reads: Sequence[str], writes: Sequence[str], op: Any) -> Any: ...

    def TensorSpec(self, shape: tuple[int, ...], dtype: torch.dtype) -> Any: ...


@dataclass(frozen=True)
class StageShape:
    """Which part of the model a stage is: its layers, and the routed experts of each that this rank holds."""

    layers: range
    experts: range
    is_first: bool
    is_last: bool


class ModelStage(nn.Module):
    def __init__(self, config: ModelConfig, shape: StageShape, tools: Toolbox, types: SegmentTypes) -> None:
        super().__init__()
        self.config, self.shape, self.tools = config, shape, tools
        self._types = types
        if shape.is_first:
            self.embedding = Embedding(config.vocab_size, config.hidden_size, tools)
        self.layers = nn.ModuleDict({str(i): Layer(config, i, shape.experts, tools) for i in shape.layers})
        if shape.is_last:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps, tools)
            self.head = Linear(config.hidden_size, config.vocab_size, tools)

    # -- the stage contract ------------------------------------------------------------------------------------

    def input_spec(self, micro_batch: MicroBatch) -> tuple[Any, ...]:
        return () if self.shape.is_first else self._hidden_spec(micro_batch)

    def output_spec(self, micro_batch: MicroBatch) -> tuple[Any, ...]:
        return () if self.shape.is_last else self._hidden_spec(micro_batch)

    def segments(self, micro_batch: MicroBatch) -> Sequence[Any]:
        """Segments of one micro-batch; the last stage's `out0` is the scaled sum of the token losses."""
        out = self._body(micro_batch, self._finish_with_loss if self.shape.is_last else None)
        make = (self._types.compute, self._types.communicate)
        return [make[comm](name, reads, writes, work) for name, comm, reads, writes, work in out.items]

    # -- outside a pipeline ------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, micro_batch: MicroBatch) -> Tensor:
        """Logits [B, S, V] of a whole model, without gradients; for generation and checks."""
        out = self._body(micro_batch, lambda h, _: self.head(self.norm(h)))
        values: dict[str, Any] = {}
        for _, is_comm, reads, writes, work in out.items:
            arguments = [values[name] for name in reads]
            results = work.start(*arguments).wait() if is_comm else work(*arguments)
            results = results if isinstance(results, tuple) else (results,)
            values.update(zip(writes, results, strict=True))
        return values["out0"]

    def routers(self) -> Iterator[Router]:
        """The routers of this stage, in the order of the layers."""
        for layer in self.layers.values():
            if isinstance(layer, Layer) and layer.is_moe:
                yield layer.router

    # -- how it is put together --------------------------------------------------------------------------------

    def _hidden_spec(self, micro_batch: MicroBatch) -> tuple[Any, ...]:
        shape = (*micro_batch.tokens_BS.shape, self.config.hidden_size)
        return (self._types.TensorSpec(shape, self.tools.precision.dtype),)

    def _body(self, micro_batch: MicroBatch, finish: Any) -> SegmentWriter:
        context = self._attention_context(micro_batch)
        out = SegmentWriter()
        residual: tuple[str, ...] = ("in0",)
        if self.shape.is_first:
            out.compute("embedding", (), ("embedded",), lambda: self.embedding(micro_batch.tokens_BS))
            residual = ("embedded",)
        for layer in self.layers.values():
            assert isinstance(layer, Layer)
            residual = layer.write(out, residual, context)
        if finish is None:
            out.compute("output", residual, ("out0",), add)
        else:
            out.compute("head", residual, ("out0",), lambda *parts: finish(add(*parts), micro_batch))
        return out

    def _attention_context(self, micro_batch: MicroBatch) -> AttentionContext:
        c = self.config
        cos, sin = rotation(micro_batch.positions_BS, c.rope_dim, c.rope_base, self.tools.precision.dtype)
        return AttentionContext(micro_batch.documents_BS, cos, sin)

    def _finish_with_loss(self, h_BSD: Tensor, micro_batch: MicroBatch) -> Tensor:
        logits = self.head(self.norm(h_BSD))
        return token_loss(logits.flatten(0, 1), micro_batch.targets_BS.flatten(), micro_batch.loss_scale)
