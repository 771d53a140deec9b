"""Generation through the C++ kernels of model/cpu (`Toolbox.cpp`): a layer's routed experts in one call, and the
attention of whole prompts in one call per length. FP32 on a CPU; anything else goes the ways of `decode.py`.

Results differ from those in rounding only, and a row's does not depend on the other rows of its call: in attention not
at all; an expert with few rows adds up in another order than one with many, as everywhere in generation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention import LatentAttention
from model.cpu.kernels import kernels, suits
from model.layer import MLP, Experts, Layer
from model.layers import Linear, Toolbox
from model.precision import CastPrecision
from model.products import FEW_ROWS

MANY_ROWS = 512  # from which an MLP's rows are enough for tasks of 64 on all threads


def takes(tools: Toolbox) -> bool:
    """Whether the kernels are wanted, and take this precision on this device."""
    seam = tools.precision
    return (
        tools.cpp
        and isinstance(seam, CastPrecision)
        and seam.dtype == torch.float32
        and suits(torch.empty(0, device=tools.device))
    )


def holds_all_experts(layer: Layer) -> bool:
    """Whether the routed experts of a layer with experts are all here: then no token has to travel."""
    return isinstance(layer.experts, Experts) and len(layer.experts.numbers) == layer.router.config.num_experts


def add_routed_experts(layer: Layer, h_TD: Tensor, x_TD: Tensor, gates_TK: Tensor, slots_TK: Tensor) -> Tensor:
    """h + the sum of what each token's experts give, by their gates: [T, D]."""
    weights = (layer.experts.gate_up.weight.detach(), layer.experts.down.weight.detach())
    operands = (x_TD.contiguous(), gates_TK.contiguous(), slots_TK.contiguous(), *weights, h_TD.contiguous())
    result_TD: Tensor = kernels().experts(*operands)
    return result_TD


def add_product(h_TD: Tensor, x_TI: Tensor, linear: Linear) -> Tensor:
    """h + x · weightᵀ; for many rows oneDNN adds h where it writes the product."""
    if len(x_TI) <= FEW_ROWS:
        return h_TD + linear(x_TI)
    operands = (x_TI.contiguous(), h_TD.contiguous(), linear.weight.detach())
    result_TD: Tensor = torch.ops.mkldnn._linear_pointwise.binary(*operands, None, "add")
    return result_TD


def add_mlp(h_TD: Tensor, x_TD: Tensor, mlp: MLP) -> Tensor:
    """h + the MLP of x; of many rows as that of a single expert, whose wide values stay in the cache of a core."""
    if len(x_TD) < MANY_ROWS:
        return add_product(h_TD, mlp.kernels.swiglu(mlp.gate_up(x_TD), None), mlp.down)
    weights = (linear.weight.detach().unsqueeze(0) for linear in (mlp.gate_up, mlp.down))
    ones_T1 = x_TD.new_ones(len(x_TD), 1)
    result_TD: Tensor = kernels().experts(
        x_TD.contiguous(), ones_T1, torch.zeros_like(ones_T1, dtype=torch.int64), *weights, h_TD.contiguous()
    )
    return result_TD


def attend_prompts(
    attention: LatentAttention, rows: int, latent_q: Tensor, latents_RC: Tensor, k_rope_RA: Tensor, cos: Tensor,
    sin: Tensor,
) -> Tensor:  # fmt: skip
    """[R, H·V] of prompts without earlier tokens, `rows` tokens each, one after the other.

    latent_q   the queries' normed latents [R, ·] (the hidden states in a model without them)
    latents_RC the normed key-value latents, and maybe more columns after them
    k_rope_RA  the keys' rotary part, not yet turned; cos, sin [R, rope_dim/2] will turn it
    """
    sizes, prompts = attention.sizes, len(latent_q) // rows
    latent_q, latents, k_rope, cos, sin = (
        operand.contiguous().view(prompts, rows, -1) for operand in (latent_q, latents_RC, k_rope_RA, cos, sin)
    )
    weights = (attention.query_up.weight.detach(), attention.key_value_up.weight.detach())
    result: Tensor = kernels().attend_latents(latent_q, latents, k_rope, *weights, cos, sin, sizes.H, sizes.scale)
    return result.view(len(latents_RC), -1)
