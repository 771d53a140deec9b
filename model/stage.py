"""A contiguous slice of the model: the embedding if it is the first, layers, the head and loss if it is the last.

Implements the stage contract of `dualpipe/stage.py` without importing it: the segment and spec types come in
through `SegmentTypes`. The whole model is the stage that is both first and last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.attention import AttentionContext
from model.batch import MicroBatch
from model.config import ModelConfig
from model.layer import Layer, Residual, SegmentWriter, add
from model.layers import Embedding, Linear, RMSNorm, Toolbox
from model.loss import head_loss
from model.mtp import MTPModule
from model.protocols import AtOnce
from model.rope import rotation


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
    """embedding: the first stage's, for MTP modules of a last stage on the same rank; without it they get a copy."""

    def __init__(
        self,
        config: ModelConfig,
        shape: StageShape,
        tools: Toolbox,
        types: SegmentTypes,
        embedding: Embedding | None = None,
    ) -> None:
        super().__init__()
        self.config, self.shape, self.tools = config, shape, tools
        self._types = types
        if shape.is_first or (shape.is_last and config.mtp_depth):
            self.embedding = embedding or Embedding(config.vocab_size, config.hidden_size, tools)
        self.layers = nn.ModuleDict({str(i): Layer(config, i, shape.experts, tools) for i in shape.layers})
        if shape.is_last:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps, tools)
            self.head = Linear(config.hidden_size, config.vocab_size, tools, "head")
            depths = range(1, config.mtp_depth + 1)
            self.mtp = nn.ModuleDict({str(k): MTPModule(config, k, shape.experts, tools) for k in depths})

    # -- the stage contract ------------------------------------------------------------------------------------

    def input_spec(self, micro_batch: MicroBatch) -> tuple[Any, ...]:
        return () if self.shape.is_first else self._hidden_spec(micro_batch)

    def output_spec(self, micro_batch: MicroBatch) -> tuple[Any, ...]:
        return () if self.shape.is_last else self._hidden_spec(micro_batch)

    def segments(self, micro_batch: MicroBatch) -> Sequence[Any]:
        """Segments of one micro-batch.

        The last stage's `out0` holds the terms of the loss, scaled: the main one, one for each scale in
        `mtp_scales`, and the z-loss if there is a `z_scale`. Their sum is what is minimised.
        """
        out, context = SegmentWriter(), self._attention_context(micro_batch)
        residual = self._write_layers(out, micro_batch, context)
        if self.shape.is_last:
            self._write_losses(out, residual, micro_batch, context)
        else:
            out.compute("output", residual, ("out0",), add)
        make = (self._types.compute, self._types.communicate)
        return [make[comm](name, reads, writes, work) for name, comm, reads, writes, work in out.items]

    # -- outside a pipeline ------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, micro_batch: MicroBatch) -> Tensor:
        """Logits [B, S, V] of a whole model, without gradients; for generation and checks."""
        out = SegmentWriter()
        residual = self._write_layers(out, micro_batch, self._attention_context(micro_batch))
        out.compute("head", residual, ("out0",), lambda *parts: self.head(self.norm(add(*parts))))
        values: dict[str, Any] = {}
        for _, is_comm, reads, writes, work in out.items:
            arguments = [values[name] for name in reads]
            results = work.start(*arguments).wait() if is_comm else work(*arguments)
            results = results if isinstance(results, tuple) else (results,)
            values.update(zip(writes, results, strict=True))
        return values["out0"]

    # -- how it is put together --------------------------------------------------------------------------------

    def _hidden_spec(self, micro_batch: MicroBatch) -> tuple[Any, ...]:
        shape = (*micro_batch.tokens_BS.shape, self.config.hidden_size)
        return (self._types.TensorSpec(shape, self.tools.precision.dtype),)

    def _write_layers(self, out: SegmentWriter, micro_batch: MicroBatch, context: AttentionContext) -> Residual:
        """Append the embedding, if it is here, and the layers; returns the names whose sum is their output."""
        residual: Residual = ("in0",)
        if self.shape.is_first:
            out.compute("embedding", (), ("embedded",), lambda: self.embedding(micro_batch.tokens_BS))
            residual = ("embedded",)
        for layer in self.layers.values():
            assert isinstance(layer, Layer)
            residual = layer.write(out, residual, context)
        return residual

    def _write_losses(
        self, out: SegmentWriter, residual: Residual, micro_batch: MicroBatch, context: AttentionContext
    ) -> None:
        """Append the head, and the MTP modules if the micro-batch has scales for them."""
        depth = len(micro_batch.mtp_scales)
        if depth not in (0, self.config.mtp_depth):
            raise ValueError(f"the micro-batch has {depth} mtp_scales, the model {self.config.mtp_depth} MTP modules")
        z_name = ("z_loss",) if micro_batch.z_scale else ()

        def head(norm: RMSNorm, k: int, *parts: Tensor) -> tuple[Tensor, ...]:
            hidden_BSD = norm(add(*parts))
            results = self._losses(hidden_BSD, micro_batch, k)
            return (*results, hidden_BSD) if k < depth else results

        def writes(k: int) -> tuple[str, ...]:
            terms = (f"loss{k}",) if k else ("loss0", *z_name)
            return (*terms, f"hidden{k}") if k < depth else terms

        out.compute("head", residual, writes(0), partial(head, self.norm, 0))
        for k in range(1, depth + 1):
            module = self.mtp[str(k)]
            assert isinstance(module, MTPModule)
            tokens_BS, _ = micro_batch.ahead(k)
            residual = module.write(out, f"hidden{k - 1}", tokens_BS, self.embedding, context)
            out.compute(f"{module.label}.head", residual, writes(k), partial(head, module.norm, k))
        names = (*(f"loss{k}" for k in range(depth + 1)), *z_name)
        out.compute("loss", names, ("out0",), lambda *terms: torch.stack(terms))

    def _attention_context(self, micro_batch: MicroBatch) -> AttentionContext:
        high = torch.promote_types(self.tools.precision.dtype, torch.float32)
        cos, sin = rotation(micro_batch.positions_BS, self.config, high)
        return AttentionContext(micro_batch.documents_BS, cos, sin, micro_batch.sequence_scale)

    def _losses(self, hidden_BSD: Tensor, micro_batch: MicroBatch, depth: int) -> tuple[Tensor, ...]:
        """The scaled loss of the main model (depth 0) with its z-loss, if that is wanted, or of an MTP module."""
        targets_BS = micro_batch.ahead(depth)[1] if depth else micro_batch.targets_BS
        scale = micro_batch.mtp_scales[depth - 1] if depth else micro_batch.loss_scale
        z_scale = 0.0 if depth else micro_batch.z_scale
        flat = hidden_BSD.flatten(0, 1), targets_BS.flatten()
        loss, z_loss = head_loss(
            flat[0], self._logits, self.config.vocab_size, flat[1], scale, z_scale, self.tools.compile
        )
        return (loss, z_loss) if z_scale else (loss,)

    def _logits(self, hidden_TD: Tensor, may_defer: bool) -> Tensor:
        queue = self.tools.queue if may_defer else AtOnce()
        return self.head.products.linear(hidden_TD, self.head.weight, queue)
