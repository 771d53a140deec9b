"""Our names and shapes beside those of the public checkpoint format (Hugging Face, `deepseek_v3`): one table.

Most tensors differ in name only. Our `gate_up` is two matrices there, gate and up, one above the other here. An MTP
module k is called layer `num_layers + k − 1` there, and carries copies of the embedding and the output head.

Pure data: reading and writing files is the business of `model/hf_files.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig

_ATTENTION = {
    "attention.query_down": "self_attn.q_a_proj",
    "attention.query_norm": "self_attn.q_a_layernorm",
    "attention.query_up": "self_attn.q_b_proj",
    "attention.key_value_down": "self_attn.kv_a_proj_with_mqa",
    "attention.key_value_norm": "self_attn.kv_a_layernorm",
    "attention.key_value_up": "self_attn.kv_b_proj",
    "attention.output": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
LATENT_NORM_EPS = 1e-6  # fixed in the public model's code for the norms of the latents


@dataclass(frozen=True)
class Entry:
    """One tensor of the public format.

    name, shape   there
    ours, rows    where it belongs: rows [start, stop) of our tensor; several entries may fill one tensor
    is_linear     a matrix of a linear layer, which the FP8 variant quantises
    is_copy       the value of another entry again: written, but not needed when reading
    """

    name: str
    shape: tuple[int, ...]
    ours: str
    rows: slice
    is_linear: bool = False
    is_copy: bool = False


def entries(config: ModelConfig) -> list[Entry]:
    """All tensors of a checkpoint, in the order in which they are written."""
    vocabulary = (config.vocab_size, config.hidden_size)
    result = [_whole("model.embed_tokens.weight", "embedding.weight", vocabulary)]
    for layer in range(config.num_layers):
        result += _layer(config, f"model.layers.{layer}", f"layers.{layer}", layer >= config.num_dense_layers)
    for depth in range(1, config.mtp_depth + 1):
        result += _mtp(config, f"model.layers.{config.num_layers + depth - 1}", f"mtp.{depth}")
    result.append(_whole("model.norm.weight", "norm.weight", (config.hidden_size,)))
    result.append(_whole("lm_head.weight", "head.weight", vocabulary))
    return result


def _whole(name: str, ours: str, shape: tuple[int, ...], is_linear: bool = False, is_copy: bool = False) -> Entry:
    return Entry(name, shape, ours, slice(0, shape[0]), is_linear, is_copy)


def _mtp(config: ModelConfig, theirs: str, ours: str) -> Iterator[Entry]:
    D, vocabulary = config.hidden_size, (config.vocab_size, config.hidden_size)
    yield _whole(f"{theirs}.embed_tokens.weight", "embedding.weight", vocabulary, is_copy=True)
    yield _whole(f"{theirs}.enorm.weight", f"{ours}.embedding_norm.weight", (D,))
    yield _whole(f"{theirs}.hnorm.weight", f"{ours}.hidden_norm.weight", (D,))
    yield _whole(f"{theirs}.eh_proj.weight", f"{ours}.projection.weight", (D, 2 * D))
    yield from _layer(config, theirs, f"{ours}.layer", is_moe=True)
    yield _whole(f"{theirs}.shared_head.norm.weight", f"{ours}.norm.weight", (D,))
    yield _whole(f"{theirs}.shared_head.head.weight", "head.weight", vocabulary, is_copy=True)


def _layer(config: ModelConfig, theirs: str, ours: str, is_moe: bool) -> Iterator[Entry]:
    c, D = config, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "attention.query_down": (c.query_rank, D),
        "attention.query_norm": (c.query_rank,),
        "attention.query_up": (c.num_heads * (c.head_dim + c.rope_dim), c.query_rank or D),
        "attention.key_value_down": (c.key_value_rank + c.rope_dim, D),
        "attention.key_value_norm": (c.key_value_rank,),
        "attention.key_value_up": (c.num_heads * (c.head_dim + c.value_dim), c.key_value_rank),
        "attention.output": (D, c.num_heads * c.value_dim),
        "attention_norm": (D,),
        "mlp_norm": (D,),
    }
    for module, name in _ATTENTION.items():
        if not c.query_rank:
            if module in ("attention.query_down", "attention.query_norm"):
                continue
            name = name.replace("q_b_proj", "q_proj")
        shape = shapes[module]
        yield _whole(f"{theirs}.{name}.weight", f"{ours}.{module}.weight", shape, is_linear=len(shape) == 2)
    if not is_moe:
        yield from _mlp(f"{theirs}.mlp", f"{ours}.mlp", D, c.dense_ffn_size)
        return
    yield _whole(f"{theirs}.mlp.gate.weight", f"{ours}.router.linear.weight", (c.num_experts, D))
    yield _whole(f"{theirs}.mlp.gate.e_score_correction_bias", f"{ours}.router.bias_E", (c.num_experts,))
    for expert in range(c.num_experts):
        yield from _mlp(f"{theirs}.mlp.experts.{expert}", f"{ours}.experts.{expert}", D, c.expert_ffn_size)
    if c.num_shared_experts:
        yield from _mlp(f"{theirs}.mlp.shared_experts", f"{ours}.shared", D, c.num_shared_experts * c.expert_ffn_size)


def _mlp(theirs: str, ours: str, hidden: int, ffn: int) -> Iterator[Entry]:
    for name, rows in (("gate_proj", slice(0, ffn)), ("up_proj", slice(ffn, 2 * ffn))):
        yield Entry(f"{theirs}.{name}.weight", (ffn, hidden), f"{ours}.gate_up.weight", rows, is_linear=True)
    yield _whole(f"{theirs}.down_proj.weight", f"{ours}.down.weight", (hidden, ffn), is_linear=True)


# -- config.json -----------------------------------------------------------------------------------------------------

_SAME = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "first_k_dense_replace",
    "hidden_size": "hidden_size",
    "dense_ffn_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "key_value_rank": "kv_lora_rank",
    "head_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "expert_ffn_size": "moe_intermediate_size",
    "num_groups": "n_group",
    "groups_per_token": "topk_group",
    "route_scale": "routed_scaling_factor",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "mtp_depth": "num_nextn_predict_layers",
}
_FIXED: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
FP8_SETTINGS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def to_hf_config(config: ModelConfig, dtype: str, max_length: int) -> dict[str, Any]:
    """The content of config.json; dtype: "bfloat16", "float32" or "float8_e4m3fn".

    Raises ValueError for a model that the public code would compute differently.
    """
    if config.norm_eps != LATENT_NORM_EPS:
        raise ValueError(
            f"model.norm_eps={config.norm_eps}: the public model's latent norms are fixed at {LATENT_NORM_EPS}, so it "
            f"would compute something else"
        )
    if config.rope_factor > 1 and not config.rope_mscale_all_dim and config.rope_mscale != 1:
        raise ValueError(f"model.rope_mscale={config.rope_mscale} must be 1 when model.rope_mscale_all_dim=0")
    result = {
        "architectures": ["DeepseekV3ForCausalLM"],
        **_FIXED,
        **{theirs: getattr(config, ours) for ours, theirs in _SAME.items()},
        "num_key_value_heads": config.num_heads,
        "q_lora_rank": config.query_rank or None,
        "rope_theta": config.rope_base,
        "max_position_embeddings": max_length,
        "rope_scaling": None,
        "torch_dtype": "bfloat16" if dtype == "float8_e4m3fn" else dtype,
    }
    if config.rope_factor > 1:
        result["rope_scaling"] = {
            "type": "yarn",
            "factor": config.rope_factor,
            "original_max_position_embeddings": config.rope_original_length,
            "beta_fast": config.rope_beta_fast,
            "beta_slow": config.rope_beta_slow,
            "mscale": config.rope_mscale,
            "mscale_all_dim": config.rope_mscale_all_dim,
        }
    if dtype == "float8_e4m3fn":
        result["quantization_config"] = FP8_SETTINGS
    return result


def from_hf_config(values: dict[str, Any]) -> ModelConfig:
    """Our configuration for a config.json. Raises ValueError for anything that our model does not compute."""
    for key, wanted in _FIXED.items():
        if values.get(key, wanted) != wanted:
            raise ValueError(f"config.json: {key}={values[key]!r} is not supported; only {wanted!r} is")
    missing = sorted(theirs for theirs in _SAME.values() if theirs not in values and theirs != _SAME["mtp_depth"])
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    config = ModelConfig(**{ours: values[theirs] for ours, theirs in _SAME.items() if theirs in values})
    config.query_rank = values.get("q_lora_rank") or 0
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    config.rope_base = float(rope.get("rope_theta") or values.get("rope_theta", config.rope_base))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ValueError(f"config.json: rope type {kind!r} is not supported; only yarn is")
    if kind == "yarn":
        for key in ("factor", "original_max_position_embeddings"):
            if not rope.get(key):
                raise ValueError(f"config.json: rope scaling of type yarn without {key} is not supported")
        config.rope_factor = float(rope["factor"])
        config.rope_original_length = int(rope["original_max_position_embeddings"])
        config.rope_beta_fast = float(rope.get("beta_fast") or 32)
        config.rope_beta_slow = float(rope.get("beta_slow") or 1)
        config.rope_mscale_all_dim = float(rope.get("mscale_all_dim") or 0)
        if config.rope_mscale_all_dim and not rope.get("mscale"):
            raise ValueError("config.json: rope_scaling with mscale_all_dim but without mscale is not supported")
        config.rope_mscale = float(rope["mscale"]) if config.rope_mscale_all_dim else 1.0
    config.check()
    return config
