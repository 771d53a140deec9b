"""The forward of generation: some new tokens of several sequences, whose earlier tokens are in a latent cache.

Every product with a weight takes all new tokens of the batch at once, whatever sequence they belong to; only attention
looks at sequences. It is computed in one of two forms, which differ in rounding alone:

    absorbed    q · W_k goes into the latent space, attention works on the cached latents, W_v brings its result back.
                Nothing is made per earlier token; each pair of tokens costs 2·key_value_rank + rope_dim per head.
    expanded    keys and values of all heads are made from the latents as in training. A pair of tokens costs less,
                head_dim + rope_dim + value_dim, so this is the form for long stretches of new tokens.

Shapes: T new tokens of all sequences, D hidden size; in a group of B sequences with n new tokens each: L tokens with
the earlier ones, H heads; C = key_value_rank + rope_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import fused
from model.attention import LatentAttention
from model.config import ModelConfig
from model.latent_cache import LatentCache
from model.layer import MLP, Layer, add
from model.layers import Linear
from model.mtp import MTPModule
from model.protocols import Pending
from model.rope import rotate_, rotation
from model.stage import ModelStage

Flow = Generator[None, None, Tensor]
Start = Callable[[str, Callable[[], Pending]], Pending]

ROWS = 256  # queries of the expanded form whose scores exist at once


@dataclass(frozen=True)
class Piece:
    """The next tokens of one sequence. slots: where its tokens live in the cache, earlier ones first, then these."""

    tokens: Sequence[int]
    slots: Tensor

    @property
    def past(self) -> int:
        return len(self.slots) - len(self.tokens)


@dataclass(frozen=True)
class Group:
    """Sequences with the same number n of new tokens and about the same length, for one attention product.

    rows_R     which of the T rows they are, sequence by sequence; R = B·n
    slots_BL   of all their tokens, short ones filled up with slot 0
    hidden_BnL which of these a new token may not see: later ones, and what is filled up
    fresh      none of them has earlier tokens
    """

    rows_R: Tensor
    slots_BL: Tensor
    hidden_BnL: Tensor
    fresh: bool


@dataclass(frozen=True)
class DecodeBatch:
    """tokens_T and where their latents go, their rotary angles, the groups for attention, each piece's last row."""

    tokens_T: Tensor
    slots_T: Tensor
    cos: Tensor
    sin: Tensor
    groups: tuple[Group, ...]
    ends: tuple[int, ...]

    @staticmethod
    def of(pieces: Sequence[Piece], config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> DecodeBatch:
        """Lay the pieces end to end. dtype: of the rotary angles, FP32 or better."""
        tokens = [token for piece in pieces for token in piece.tokens]
        positions = torch.cat([torch.arange(p.past, len(p.slots)) for p in pieces]).to(device)
        slots = torch.cat([p.slots[p.past :] for p in pieces]).to(device)
        cos, sin = rotation(positions, config, dtype)
        ends, total = [], 0
        starts = []
        for piece in pieces:
            starts.append(total)
            total += len(piece.tokens)
            ends.append(total - 1)
        alike: dict[tuple[int, int], list[int]] = {}
        for i, piece in enumerate(pieces):
            alike.setdefault((len(piece.tokens), len(piece.slots).bit_length()), []).append(i)
        groups = tuple(_group([pieces[i] for i in members], [starts[i] for i in members], device)
                       for members in alike.values())  # fmt: skip
        return DecodeBatch(torch.tensor(tokens, device=device), slots, cos, sin, groups, tuple(ends))


def _group(pieces: Sequence[Piece], starts: Sequence[int], device: torch.device | str) -> Group:
    n, length = len(pieces[0].tokens), max(len(p.slots) for p in pieces)
    rows = torch.tensor(starts).unsqueeze(1) + torch.arange(n)
    past_B1 = torch.tensor([[p.past] for p in pieces])
    slots = torch.nn.utils.rnn.pad_sequence([p.slots for p in pieces], batch_first=True)
    newest_Bn = past_B1 + torch.arange(n)
    hidden = torch.arange(length) > newest_Bn.unsqueeze(-1)
    fresh = not any(p.past for p in pieces)
    return Group(rows.flatten().to(device), slots.to(device), hidden.to(device), fresh)


@dataclass(frozen=True)
class Wanted:
    """What is looked at after the last layer: some rows of a batch, and these rows as a batch (None: there are none).

    Of all other rows the last layer only writes the latents.
    """

    rows_W: Tensor
    batch: DecodeBatch | None


class Decoder:
    """A stage (a slice of the model, or all of it) that continues sequences, and its cache.

    It uses the weights of the stage as they are. Only for a precision whose activations are narrower than parameters
    does it keep copies, of the key-value up-projections. Make a new one when weights have changed.

    loads   for each layer with experts, by label, how many tokens each expert has got so far: int64 [E]
    """

    def __init__(self, stage: ModelStage, slots: int, drafts: bool = False, start: Start | None = None) -> None:
        """slots: tokens that the cache can hold. drafts: also keep what the first MTP module reads.

        start   starts a communication on its lane (dualpipe/lanes.py); None: at once, where it is called
        """
        self.start: Start = start or (lambda name, begin: begin())
        self.stage, self.config = stage, stage.config
        self.dtype = stage.tools.precision.dtype
        self.device = torch.device(stage.tools.device)
        self.layers: list[Layer] = [layer for layer in stage.layers.values() if isinstance(layer, Layer)]
        self.module: MTPModule | None = None
        if drafts:
            module = stage.mtp["1"] if stage.shape.is_last and self.config.mtp_depth else None
            if not isinstance(module, MTPModule):
                raise ValueError("drafts need a model with an MTP module (model.mtp_depth=1 or more in training)")
            self.module = module
        attending = [*self.layers, *([self.module.layer] if self.module else [])]
        self.cache = LatentCache(self.config, [layer.label for layer in attending], slots, self.dtype, self.device)
        moe = [layer for layer in attending if layer.is_moe]
        sizes = (len(moe), self.config.num_experts)
        counts = torch.zeros(sizes, dtype=torch.int64, device=self.device)
        self.loads: dict[str, Tensor] = {layer.label: row for layer, row in zip(moe, counts, strict=True)}
        self.absorbed = {layer.label: _up_projections(layer.attention, self.dtype) for layer in attending}
        self.fused = fused.takes(stage.tools)

    def batch(self, pieces: Sequence[Piece]) -> DecodeBatch:
        return DecodeBatch.of(pieces, self.config, torch.promote_types(self.dtype, torch.float32), self.device)

    def wanted(self, pieces: Sequence[Piece], counts: Sequence[int]) -> Wanted | None:
        """The last counts[i] tokens of each piece; None if that is all of them."""
        ends = 0
        rows: list[int] = []
        kept: list[Piece] = []
        for piece, count in zip(pieces, counts, strict=True):
            ends += len(piece.tokens)
            if count:
                rows += range(ends - count, ends)
                kept.append(Piece(piece.tokens[-count:], piece.slots))
        if len(rows) == ends:
            return None
        return Wanted(torch.tensor(rows, dtype=torch.int64, device=self.device), self.batch(kept) if kept else None)

    @torch.no_grad()
    def forward(self, batch: DecodeBatch, hidden_TD: Tensor | None = None, wanted: Wanted | None = None) -> Tensor:
        """[T, D]: what the last layer gives for the new tokens; on the last stage after the final norm.

        hidden_TD   what the stage before gave; the first stage embeds the tokens instead
        wanted      on the last stage: rows without which the result can do [W, D]
        """
        h_TD = self.stage.embedding(batch.tokens_T) if hidden_TD is None else hidden_TD
        (h_TD,) = take_turns([self.flow(self.layers, h_TD, batch, wanted)])
        return self.stage.norm(h_TD) if self.stage.shape.is_last else h_TD

    @torch.no_grad()
    def forward_both(self, batches: Sequence[DecodeBatch | None]) -> Tensor:
        """`forward` of micro-batches in turns: each computes while the others' tokens are on their way to experts.

        Of the rows of all of them, one after the other, for a stage that is the whole model. None: no rows. A later
        micro-batch may go on with a sequence of an earlier one: its latents are in the cache, layer by layer.
        """
        flows = [self.flow(self.layers, self._embed(batch), batch) for batch in batches]
        return self.stage.norm(torch.cat(take_turns(flows)))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Rows [R, D] after the final norm → [R, V]."""
        return self.stage.head(hidden)

    @torch.no_grad()
    def draft(self, batch: DecodeBatch, hidden_TD: Tensor) -> Tensor:
        """The MTP module's hidden states [T, D] (for `logits`), which foretell the token after the given one.

        Row by row it sees the main model's hidden state at a position, and the token that follows: batch.tokens_T.
        """
        assert self.module is not None
        merged_TD = self.module.merge(hidden_TD, batch.tokens_T, self.stage.embedding)
        (h_TD,) = take_turns([self.flow([self.module.layer], merged_TD, batch)])
        return self.module.norm(h_TD)

    @torch.no_grad()
    def join(self, drafts: bool = False, parts: int = 1) -> None:
        """Take part in a step without tokens of one's own: other ranks' tokens come to the experts that are here.

        parts   the micro-batches of the step
        """
        take_turns([self.flow(self.layers, self._embed(None), None) for _ in range(parts)])
        if drafts:
            self.join_draft()

    @torch.no_grad()
    def join_draft(self) -> None:
        """The same for `draft`."""
        assert self.module is not None
        take_turns([self.flow([self.module.layer], self._embed(None), None)])

    def _embed(self, batch: DecodeBatch | None) -> Tensor:
        if batch is None:
            return torch.empty(0, self.config.hidden_size, dtype=self.dtype, device=self.device)
        return self.stage.embedding(batch.tokens_T)

    def flow(
        self, layers: Sequence[Layer], h_TD: Tensor, batch: DecodeBatch | None, wanted: Wanted | None = None
    ) -> Flow:
        """A micro-batch on its way through layers; stops wherever it has started a communication."""
        for layer in layers:
            if batch is not None:
                x_TD = layer.attention_norm(h_TD)
                if wanted is not None and layer is layers[-1]:
                    heads_TX, h_TD = self._attend(layer, x_TD, batch, wanted), h_TD[wanted.rows_W]
                else:
                    heads_TX = self._attend(layer, x_TD, batch)
                h_TD = self._add_product(h_TD, heads_TX, layer.attention.output)
            if layer.is_moe:
                x_TD = layer.mlp_norm(h_TD) if batch is not None else h_TD
                h_TD = yield from self._add_experts(layer, h_TD, x_TD)
            elif batch is not None:
                h_TD = self._add_mlp(h_TD, layer.mlp_norm(h_TD), layer.mlp)
        return h_TD

    def _add_product(self, h_TD: Tensor, x_TX: Tensor, linear: Linear) -> Tensor:
        return fused.add_product(h_TD, x_TX, linear) if self.fused else h_TD + linear(x_TX)

    def _add_mlp(self, h_TD: Tensor, x_TD: Tensor, mlp: MLP) -> Tensor:
        return fused.add_mlp(h_TD, x_TD, mlp) if self.fused else h_TD + mlp(x_TD)

    def _add_experts(self, layer: Layer, h_TD: Tensor, x_TD: Tensor) -> Flow:
        """The residual stream with what a MoE layer adds to it. The shared expert runs under the dispatch."""
        scores_TE, experts_TK = layer.router.choose(x_TD)
        chosen = experts_TK.flatten()
        self.loads[layer.label].scatter_add_(0, chosen, torch.ones_like(chosen))
        if self.fused and fused.holds_all_experts(layer):
            gates_TK = layer.router.gates(scores_TE, experts_TK)
            if layer.shared is not None:
                h_TD = fused.add_mlp(h_TD, x_TD, layer.shared)
            return fused.add_routed_experts(layer, h_TD, x_TD, gates_TK, layer.slot_E[experts_TK])
        exchange, chosen_TK = layer.tools.dispatcher.open(), layer.slot_E[experts_TK]
        sizes = self.start(f"{layer.label}.counts", lambda: exchange.counts.start(chosen_TK))
        gates_TK = layer.router.gates(scores_TE, experts_TK)
        table = sizes.wait()
        arriving = self.start(
            f"{layer.label}.dispatch", lambda: exchange.dispatch.start(x_TD, gates_TK, chosen_TK, *table)
        )
        yield
        shared = () if layer.shared is None or not len(x_TD) else (layer.shared(x_TD),)
        weighted = layer.experts(*arriving.wait())
        coming = self.start(f"{layer.label}.combine", lambda: exchange.combine.start(weighted))
        yield
        return add(h_TD, *shared, *coming.wait())

    def _attend(self, layer: Layer, x_TD: Tensor, batch: DecodeBatch, wanted: Wanted | None = None) -> Tensor:
        """Write the latents of all rows; the mixed values of all heads [., H·V] of all rows, or the wanted ones."""
        c, attention = self.config, layer.attention
        latent_kv, k_rope = attention.key_value_down(x_TD).split((c.key_value_rank, c.rope_dim), dim=-1)
        turned = rotate_(k_rope.to(self._high, copy=True), batch.cos, batch.sin)
        new_TC = torch.cat((attention.key_value_norm(latent_kv), turned.to(self.dtype)), -1)
        self.cache.write(layer.label, batch.slots_T, new_TC)
        if wanted is not None:
            if wanted.batch is None:
                return x_TD.new_empty(0, attention.sizes.H * attention.sizes.V)
            batch, x_TD, new_TC, k_rope = wanted.batch, *(t[wanted.rows_W] for t in (x_TD, new_TC, k_rope))
        latent_q = attention.query_norm(attention.query_down(x_TD)) if c.query_rank else x_TD
        return self._attend_groups(layer, latent_q, new_TC, k_rope, batch).to(self.dtype)

    @property
    def _high(self) -> torch.dtype:
        """What queries are turned and scaled in, and scores computed: on a CPU at least FP32."""
        return torch.promote_types(self.dtype, torch.float32) if self.device.type == "cpu" else self.dtype

    def _attend_groups(
        self, layer: Layer, latent_q: Tensor, new_TC: Tensor, k_rope_TR: Tensor, batch: DecodeBatch
    ) -> Tensor:
        """[T, H·V] from what queries are made of, new latents, and the keys' rotary parts before they were turned."""
        sizes, only = layer.attention.sizes, len(batch.groups) == 1
        at_once = [
            self.fused and g.fresh and prefers_expanded(self.config, g.hidden_BnL.shape[1]) for g in batch.groups
        ]
        if not all(at_once):
            q_THQ = layer.attention.query_up(latent_q).to(self._high, copy=True).view(-1, sizes.H, sizes.N + sizes.R)
            rotate_(q_THQ[..., sizes.N :], batch.cos.unsqueeze(1), batch.sin.unsqueeze(1))
            q_THQ.mul_(sizes.scale)
        out_TX = latent_q.new_empty(0)
        for group, whole in zip(batch.groups, at_once, strict=True):
            rows = slice(None) if only else group.rows_R
            if whole:
                parts = (t[rows] for t in (latent_q, new_TC, k_rope_TR, batch.cos, batch.sin))
                out = fused.attend_prompts(layer.attention, group.hidden_BnL.shape[1], *parts)
            else:
                out = self._attend_group(layer, q_THQ[rows], group)
            if only:
                return out
            if not len(out_TX):
                out_TX = out.new_empty(len(latent_q), out.shape[1])
            out_TX[rows] = out
        return out_TX

    def _attend_group(self, layer: Layer, q_RHQ: Tensor, group: Group) -> Tensor:
        """[R, H·V] of the rows of a group."""
        latents_BLC = self.cache.read(layer.label, group.slots_BL)
        if prefers_expanded(self.config, group.hidden_BnL.shape[1]):
            return _expanded(layer.attention, q_RHQ, latents_BLC, group.hidden_BnL)
        return _absorbed(q_RHQ, latents_BLC.to(q_RHQ.dtype), group.hidden_BnL, *self.absorbed[layer.label])


def take_turns(flows: Sequence[Flow]) -> list[Tensor]:
    """Run flows until all have ended, each up to where it stops, in turns; what they return.

    For two micro-batches a and b this is the order of the report (3.4.1): attention of a, its dispatch, attention of b
    under it; experts of a under the dispatch of b, experts of b under the combine of a, and so on.
    """
    results: dict[int, Tensor] = {}
    going = dict(enumerate(flows))
    while going:
        for i, flow in list(going.items()):
            try:
                next(flow)
            except StopIteration as end:
                results[i] = end.value
                del going[i]
    return [results[i] for i in range(len(flows))]


def prefers_expanded(config: ModelConfig, new_tokens: int) -> bool:
    """Whether so many new tokens pay for making an earlier token's keys and values (multiplications per head)."""
    c = config
    saved = (2 * c.key_value_rank + c.rope_dim) - (c.head_dim + c.rope_dim + c.value_dim)
    return new_tokens * saved > c.key_value_rank * (c.head_dim + c.value_dim)


def _up_projections(attention: LatentAttention, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W_k [H, N, rank] and W_v [H, rank, V]; views of the weight if it has the wanted dtype."""
    sizes, weight = attention.sizes, attention.key_value_up.weight.detach().to(dtype)
    both = weight.view(sizes.H, sizes.N + sizes.V, -1)
    return both[:, : sizes.N], both[:, sizes.N :].transpose(1, 2)


def _absorbed(q_RHQ: Tensor, latents_BLC: Tensor, hidden_BnL: Tensor, k_HNC: Tensor, v_HCV: Tensor) -> Tensor:
    R, H, _ = q_RHQ.shape
    (B, n, L), N = hidden_BnL.shape, k_HNC.shape[1]
    in_latents = torch.bmm(q_RHQ[..., :N].transpose(0, 1), k_HNC.to(q_RHQ.dtype)).transpose(0, 1)
    q_BXC = torch.cat((in_latents, q_RHQ[..., N:]), -1).view(B, n * H, -1)
    scores = torch.bmm(q_BXC, latents_BLC.transpose(1, 2)).view(B, n, H, L)
    p = _softmax(scores, hidden_BnL.unsqueeze(2)).view(B, n * H, L)
    mixed_RHC = torch.bmm(p, latents_BLC[..., : v_HCV.shape[1]]).view(R, H, -1)
    return torch.bmm(mixed_RHC.transpose(0, 1), v_HCV.to(q_RHQ.dtype)).transpose(0, 1).flatten(1)


def _expanded(attention: LatentAttention, q_RHQ: Tensor, latents_BLC: Tensor, hidden_BnL: Tensor) -> Tensor:
    sizes, (B, n, L) = attention.sizes, hidden_BnL.shape
    latents, k_rope = latents_BLC.split((latents_BLC.shape[-1] - sizes.R, sizes.R), dim=-1)
    kv_BHLX = attention.key_value_up(latents).view(B, L, sizes.H, -1).transpose(1, 2).to(q_RHQ.dtype)
    k_nope, v = kv_BHLX.split((sizes.N, sizes.V), dim=-1)
    k = torch.cat((k_nope, k_rope.to(q_RHQ.dtype).unsqueeze(1).expand(-1, sizes.H, -1, -1)), -1)
    q_BHnQ = q_RHQ.view(B, n, sizes.H, -1).transpose(1, 2)
    out = q_RHQ.new_empty(B, n, sizes.H, sizes.V)
    for start in range(0, n, ROWS):
        rows = slice(start, start + ROWS)
        p = _softmax(q_BHnQ[:, :, rows] @ k.transpose(2, 3), hidden_BnL[:, rows].unsqueeze(1))
        out[:, rows] = (p @ v).transpose(1, 2)
    return out.view(B * n, -1)


def _softmax(scores: Tensor, hidden: Tensor) -> Tensor:
    high = torch.promote_types(scores.dtype, torch.float32)
    return scores.masked_fill_(hidden, float("-inf")).softmax(-1, dtype=high).to(scores.dtype)
