"""What a micro-batch leaves between its forward and its backward, by formula: the inputs that each backward wants.

In bytes, with activations in BF16 and every expert equally busy, as under a balanced router. A test compares it with
what the modules keep when they run on the meta device (`parallel/rehearsal.py`, which `train.py dry_run=true` uses).
"""

from __future__ import annotations

from model.config import ModelConfig
from model.loss import MAX_LOGITS

BYTES = 2


def attention_activations(config: ModelConfig) -> int:
    """Per token of one layer: both norms' inputs and outputs, the latents, and the heads unless they are made again."""
    c = config
    latents = c.query_rank + c.key_value_rank + c.rope_dim
    heads = c.num_heads * (c.head_dim + c.rope_dim) + c.num_heads * (c.head_dim + c.value_dim)
    normed = c.query_rank + c.key_value_rank
    kept = latents if c.recompute else latents + normed + heads
    return BYTES * (4 * c.hidden_size + kept + c.num_heads * c.value_dim)


def layer_activations(config: ModelConfig, is_moe: bool) -> int:
    """Per token of one layer. SwiGLU keeps its two inputs, the product after it their one."""
    c = config
    if not is_moe:
        return attention_activations(c) + BYTES * 3 * c.dense_ffn_size
    rows = c.experts_per_token * (c.hidden_size + 3 * c.expert_ffn_size)
    shared = 3 * c.num_shared_experts * c.expert_ffn_size
    router = 4 * c.hidden_size + 3 * 4 * c.num_experts  # FP32: its input, and scores on their way to gates and counts
    return attention_activations(c) + BYTES * (rows + shared) + router


def stage_activations(config: ModelConfig, layers: range, is_last: bool, tokens: int) -> int:
    """Of one micro-batch of so many tokens in a stage that holds these layers."""
    c = config
    per_token = sum(layer_activations(c, layer >= c.num_dense_layers) for layer in layers)
    if not is_last:
        return per_token * tokens
    head = BYTES * 2 * c.hidden_size  # the last norm's input and output
    # An MTP module keeps the embedding and the concatenation besides.
    mtp = c.mtp_depth * (layer_activations(c, True) + head + BYTES * 3 * c.hidden_size)
    logits = BYTES * c.vocab_size if tokens * c.vocab_size <= MAX_LOGITS else 0  # beyond, they are made again
    return (per_token + head + mtp + (1 + c.mtp_depth) * logits) * tokens
