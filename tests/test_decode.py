"""Generation's forward over the latent cache against the training forward, at every position."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.peer import our_model
from model.batch import MicroBatch
from model.config import ModelConfig
from model.decode import Decoder, Piece, prefers_expanded, take_turns
from model.describe import cache_bytes
from model.names import named_routers
from model.stage import ModelStage

CONFIG = ModelConfig(
    vocab_size=61, num_layers=3, num_dense_layers=1, hidden_size=48, dense_ffn_size=40, num_heads=3, query_rank=12,
    key_value_rank=10, head_dim=8, rope_dim=4, value_dim=6, num_experts=8, experts_per_token=3, expert_ffn_size=24,
    num_groups=4, groups_per_token=2, mtp_depth=1, init_std=0.2,
)  # fmt: skip
LENGTH = 40


def model_of(config: ModelConfig, precision: str = "fp64") -> ModelStage:
    model = our_model(config, precision, seed=3).stages[0]
    generator = torch.Generator().manual_seed(0)
    for router in named_routers(model).values():
        router.bias_E.copy_(0.2 * torch.randn(config.num_experts, generator=generator))
    return model


def rows(count: int, length: int = LENGTH, seed: int = 0) -> list[list[int]]:
    return torch.randint(0, 61, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def training_logits(model: ModelStage, tokens: list[list[int]]) -> Tensor:
    batch = torch.tensor(tokens)
    return model.logits(
        MicroBatch(batch, batch, torch.zeros_like(batch), torch.arange(batch.shape[1]).expand_as(batch))
    )


def decoded_logits(model: ModelStage, tokens: list[list[int]], cuts: list[int]) -> Tensor:
    """All sequences side by side, cut into pieces at the same positions; slots dealt out at random."""
    decoder = Decoder(model, slots=len(tokens) * LENGTH)
    slots = torch.randperm(len(tokens) * LENGTH, generator=torch.Generator().manual_seed(1)).view(len(tokens), -1)
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(tokens[0])], strict=True):
        pieces = [Piece(row[start:end], slots[i, :end]) for i, row in enumerate(tokens)]
        hidden = decoder.forward(decoder.batch(pieces))
        parts.append(decoder.logits(hidden).view(len(tokens), end - start, -1))
    return torch.cat(parts, 1)


CONFIGS = {
    "whole": CONFIG,
    "no query rank": replace(CONFIG, query_rank=0, num_shared_experts=0),
    "yarn": replace(CONFIG, rope_factor=4.0, rope_original_length=16),
    "dense": replace(CONFIG, num_dense_layers=3, mtp_depth=0),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "cuts", [list(range(1, LENGTH)), [], [7, 8, 9, 30], [25]], ids=["tokens", "whole", "mix", "two"]
)
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_every_position_equals_the_training_forward(config: ModelConfig, cuts: list[int], precision: str) -> None:
    model, tokens = model_of(config, precision), rows(3)
    ours, wanted = decoded_logits(model, tokens, cuts), training_logits(model, tokens)
    tolerance = 1e-12 if precision == "fp64" else 1e-4
    assert float((ours - wanted).abs().max()) < tolerance * float(wanted.abs().max())


def test_both_forms_of_attention_were_among_these() -> None:
    assert [prefers_expanded(CONFIG, n) for n in (1, 7, 23, 24, 40)] == [False, False, False, True, True]


def test_bf16_is_near_the_training_forward() -> None:
    model, tokens = model_of(CONFIG, "bf16"), rows(2)
    ours, wanted = decoded_logits(model, tokens, list(range(1, LENGTH))), training_logits(model, tokens)
    exact = training_logits(model_of(CONFIG, "fp64"), tokens)
    ours_off, theirs_off = ((x - exact).abs().mean() for x in (ours, wanted))
    assert float(ours_off) < 1.5 * float(theirs_off)


def test_sequences_of_unequal_length_share_a_batch() -> None:
    """Prefill, decode and two tokens at once in one batch, at lengths that make several groups."""
    model, tokens = model_of(CONFIG), rows(6)
    wanted = training_logits(model, tokens)
    decoder = Decoder(model, slots=6 * LENGTH)
    slots = torch.arange(6 * LENGTH).view(6, LENGTH)
    past, new = [3, 0, 17, 38, 20, 9], [1, 40, 2, 1, 2, 1]
    before = [(i, p) for i, p in enumerate(past) if p]
    decoder.forward(decoder.batch([Piece(tokens[i][:p], slots[i, :p]) for i, p in before]))
    pieces = [Piece(tokens[i][p : p + n], slots[i, : p + n]) for i, (p, n) in enumerate(zip(past, new, strict=True))]
    batch = decoder.batch(pieces)
    logits = decoder.logits(decoder.forward(batch))
    assert len(batch.groups) > 3
    expected = torch.cat([wanted[i, p : p + n] for i, (p, n) in enumerate(zip(past, new, strict=True))])
    assert torch.allclose(logits, expected, rtol=1e-11, atol=1e-11)
    assert torch.allclose(logits[list(batch.ends)], torch.stack([wanted[i, p + n - 1] for i, (p, n) in enumerate(
        zip(past, new, strict=True))]), rtol=1e-11, atol=1e-11)  # fmt: skip


def test_a_slot_that_is_written_again_forgets_what_was_there() -> None:
    """As after a draft that was not accepted."""
    model, tokens = model_of(CONFIG), rows(1)
    decoder, slots = Decoder(model, LENGTH), torch.arange(LENGTH)
    decoder.forward(decoder.batch([Piece([*tokens[0][:10], 5, 6], slots[:12])]))
    hidden = decoder.forward(decoder.batch([Piece(tokens[0][10:15], slots[:15])]))
    wanted = training_logits(model, tokens)[0, 10:15]
    assert torch.allclose(decoder.logits(hidden), wanted, rtol=1e-11, atol=1e-11)


def test_stages_hand_hidden_states_on() -> None:
    """A model cut into the layers before and after a border, each with its own cache."""
    whole, tokens = model_of(replace(CONFIG, mtp_depth=0)), rows(1)[0]
    first, last = Decoder(whole, LENGTH), Decoder(whole, LENGTH)
    first.layers, last.layers = first.layers[:1], last.layers[1:]
    slots = torch.arange(LENGTH)
    parts = []
    for i in range(LENGTH):
        batch = first.batch([Piece(tokens[i : i + 1], slots[: i + 1])])
        h = whole.embedding(batch.tokens_T)
        for decoder in (first, last):
            (h,) = take_turns([decoder.flow(decoder.layers, h, batch)])
        parts.append(whole.head(whole.norm(h)))
    assert torch.allclose(torch.cat(parts), training_logits(whole, [tokens])[0], rtol=1e-11, atol=1e-11)


def test_bytes_per_token_are_the_published_formula() -> None:
    full = ModelConfig(
        vocab_size=16, num_layers=61, num_dense_layers=61, hidden_size=8, dense_ffn_size=8, num_heads=1, query_rank=4,
        key_value_rank=512, rope_dim=64, head_dim=8, value_dim=8,
    )  # fmt: skip
    decoder = Decoder(model_of(full, "bf16"), slots=3)
    assert decoder.cache.bytes_per_token == cache_bytes(full) == 70_272
    small = Decoder(model_of(CONFIG, "bf16"), slots=3)
    assert small.cache.bytes_per_token == cache_bytes(CONFIG) == 3 * (10 + 4) * 2


def test_drafts_equal_the_training_forward_of_mtp() -> None:
    """Loss of the MTP module from drafted logits against the stage's own."""
    replica = our_model(CONFIG, "fp64", seed=3)
    model, (tokens,) = replica.stages[0], rows(1)
    decoder, slots = Decoder(model, LENGTH, drafts=True), torch.arange(LENGTH)
    losses = []
    for i in range(LENGTH - 2):
        hidden = decoder.forward(decoder.batch([Piece(tokens[i : i + 1], slots[: i + 1])]))
        drafted = decoder.draft(decoder.batch([Piece(tokens[i + 1 : i + 2], slots[: i + 1])]), hidden)
        losses.append(-decoder.logits(drafted)[0].log_softmax(-1)[tokens[i + 2]])
    batch = torch.tensor([tokens])
    positions = torch.arange(LENGTH - 1).unsqueeze(0)
    mb = MicroBatch(batch[:, :-1], batch[:, 1:], torch.zeros_like(positions), positions, 1.0, (1.0,))
    wanted = float(replica.pipeline.step([mb])[0][1])
    assert abs(float(sum(losses)) - wanted) < 1e-9 * wanted


def test_drafts_need_an_mtp_module() -> None:
    with pytest.raises(ValueError, match="mtp_depth"):
        Decoder(model_of(replace(CONFIG, mtp_depth=0)), 4, drafts=True)
