"""What FP8 costs on a CPU, what it saves, and how exact its products are.

.venv/bin/python -m benchmarks.fp8 [--only step,bytes,errors]

step     a training step of `tiny`, 4 × 256 tokens, reference backend against BF16; one thread, in turns, medians
bytes    what a Linear and a SwiGLU keep for backward, what a token takes on its way to an expert, and what a layer
         of DeepSeek-V3 keeps altogether (counted on the meta device); FP8 with its scales against BF16
errors   the three products of every kind of Linear of DeepSeek-V3, all sizes divided by 8, against FP64: tiles and
         blocks beside one scale for each tensor. Activations and gradients are normal, or as in trained models
         heavy-tailed: one channel in 64 is 1,000 times larger, its weights as much smaller, and rows differ in
         size (log-normal)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.report import Row, publish
from dualpipe.schedules import make_schedule
from dualpipe.wgrad import WeightGradQueue
from model.batch import MicroBatch
from model.config import ModelConfig
from model.fp8.quantize import Quantized, quantize_blocks, quantize_tensor, quantize_tiles, quantize_transposed
from model.fp8.reference import ReferenceBackend
from model.functional import make_kernels
from model.precisions import make_precision
from model.protocols import AtOnce
from parallel.build import BuildOptions, build_replica, build_stages
from parallel.mesh import Layout, Mesh
from parallel.packing import Columns
from parallel.rehearsal import PaperDispatcher, rehearse
from parallel.rows import Fp8Rows, PlainRows
from training.optimizer import OptimConfig, make_update
from training.step import train_step

ALONE = Mesh(Layout(1, 1, 1), 0, None, None, None, None, None)
HIDDEN, EXPERT = 7168, 2048
# Of DeepSeek-V3: outputs and inputs.
SHAPES = {
    "query_down": (1536, HIDDEN),
    "query_up": (24576, 1536),
    "key_value_down": (576, HIDDEN),
    "key_value_up": (32768, 512),
    "output": (HIDDEN, 16384),
    "dense gate_up": (36864, HIDDEN),
    "dense down": (HIDDEN, 18432),
    "expert gate_up": (2 * EXPERT, HIDDEN),
    "expert down": (HIDDEN, EXPERT),
}
# The Linears of an MoE layer by their names in the table of formats.
MODULES = {
    "attention_query_down": "query_down",
    "attention_query_up": "query_up",
    "attention_key_value_down": "key_value_down",
    "attention_key_value_up": "key_value_up",
    "attention_output": "output",
    "shared_gate_up": "expert gate_up",
    "shared_down": "expert down",
    "experts_gate_up": "expert gate_up",
    "experts_down": "expert down",
}
SCALE_DOWN, TOKENS = 8, 512


# -- time --------------------------------------------------------------------------------------------------------------


def make_step(precision: str) -> Callable[[int], None]:
    seam, dtype = make_precision(precision)
    config = ModelConfig()
    replica = build_replica(config, make_schedule("one_f_one_b", 1, 1), ALONE, seam, BuildOptions(param_dtype=dtype))
    update = make_update(replica, OptimConfig(moments="bf16"))

    def step(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, config.vocab_size, (4, 257), generator=generator)
        positions = torch.arange(256).expand(4, 256)
        batch = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:], torch.zeros_like(positions), positions)
        train_step(replica, update, [batch], 1e-3, 1.0, 0.001)

    return step


def measure_step(rounds: int = 11) -> list[Row]:
    torch.set_num_threads(1)
    steps = {name: make_step(name) for name in ("bf16", "fp8")}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            start = time.process_time()
            step(number)
            times[name].append(time.process_time() - start)
    ms = {name: 1000 * statistics.median(t[2:]) for name, t in times.items()}
    return [Row("step of tiny, 4 × 256", "ms of processor", ms["fp8"], "bf16", ms["bf16"])]


# -- bytes -------------------------------------------------------------------------------------------------------------


def saved_bytes(work: Callable[[], object], weights: set[int]) -> int:
    """That autograd saves during `work`, every storage once; `weights` are not counted."""
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage().data_ptr()
        if key not in weights:
            seen.setdefault(key, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        work()
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def kept_by_layers(precision: str) -> dict[str, int]:
    """By a Linear, the one after the attention, and SwiGLU with its Linear; a quarter of DeepSeek-V3's width."""
    seam, _ = make_precision(precision)
    hidden, ffn, now = HIDDEN // 4, EXPERT // 4, AtOnce()
    x = torch.randn(TOKENS, hidden).bfloat16().requires_grad_()
    gate_up = torch.randn(TOKENS, 2 * ffn).bfloat16().requires_grad_()
    wide, narrow = (torch.nn.Parameter(torch.randn(hidden, size)) for size in (hidden, ffn))
    swiglu = partial(seam.of("experts_down").swiglu_linear, gate_up, None, narrow, None, make_kernels(False), now)
    kinds: dict[str, Callable[[], object]] = {
        "input of a Linear": partial(seam.of("mlp_gate_up").linear, x, wide, now),
        "input of the Linear after the attention": partial(seam.of("attention_output").linear, x, wide, now),
        "SwiGLU and input of its Linear": swiglu,
    }
    found = {}
    for kind, work in kinds.items():
        work()
        weights = {t.untyped_storage().data_ptr() for t in (wide, narrow, *getattr(seam, "_copies", {}).values())}
        found[kind] = saved_bytes(work, weights)
    return found


def kept_by_all_linears(precision: str) -> int:
    """Bytes per token that the Linears of one MoE layer of DeepSeek-V3 keep of their inputs, on the meta device.

    Each by itself, though the two first of the attention share their input; nine routed and shared experts a token.
    """
    seam, dtype = make_precision(precision)
    uses = {"experts_gate_up": 8, "experts_down": 8}
    total = 0
    for module, name in MODULES.items():
        outputs, inputs = SHAPES[name]
        weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device="meta"))
        x = torch.empty(TOKENS, inputs, dtype=torch.bfloat16, device="meta", requires_grad=True)
        products = seam.of(module)
        copies: list[Tensor] = []

        def pack(tensor: Tensor, copies: list[Tensor] = copies) -> Tensor:
            if tensor.shape[0] == TOKENS:
                copies.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            products.linear(x, weight, AtOnce())
        total += sum(t.nbytes for t in copies) * uses.get(module, 1)
    return total // TOKENS


def kept_by_a_layer(precision: str) -> int:
    """Bytes of activations, by one MoE layer of DeepSeek-V3 for 4,096 tokens, from its forward to its backward."""
    seam, dtype = make_precision(precision)
    config = ModelConfig(
        num_layers=2, num_dense_layers=0, hidden_size=HIDDEN, num_heads=128, query_rank=1536, key_value_rank=512,
        head_dim=128, rope_dim=64, value_dim=128, num_experts=256, experts_per_token=8, num_groups=8,
        groups_per_token=4, expert_ffn_size=EXPERT, recompute=True,
    )  # fmt: skip
    sizes = []
    for layers in (1, 2):
        options = BuildOptions(param_dtype=dtype, device="meta")
        config.num_layers = layers
        queue, dispatcher = WeightGradQueue(), PaperDispatcher(config.num_experts, 1.0)
        stages = build_stages(config, make_schedule("one_f_one_b", 1, 1), ALONE, seam, options, queue, dispatcher)
        tokens = torch.empty(1, 4096, dtype=torch.int64, device="meta")
        batch = MicroBatch(tokens, tokens, tokens, tokens)
        sizes.append(rehearse(stages[0], batch, queue).forward.kept)
    return sizes[1] - sizes[0]


def row_bytes(hidden: int, experts: int) -> list[Row]:
    """Of one token in the block that an all-to-all sends."""
    x = torch.randn(8, hidden).bfloat16()
    choice = torch.zeros(8, experts), torch.zeros(8, experts, dtype=torch.int32)
    fp8, plain = Fp8Rows(ReferenceBackend(), torch.bfloat16), PlainRows()
    rows = []
    for what, more in (("dispatch", choice), ("combine's backward", ())):
        ours, theirs = (Columns.of((*rows.pack(x), *more)).starts[-1] for rows in (fp8, plain))
        rows.append(Row(f"a token in {what}, hidden {hidden}, top-{experts}", "bytes", ours, "bf16", theirs))
    return rows


def measure_bytes() -> list[Row]:
    fp8, bf16 = kept_by_layers("fp8"), kept_by_layers("bf16")
    rows = [Row(f"kept: {kind}", "bytes per token", fp8[kind] / TOKENS, "bf16", bf16[kind] / TOKENS) for kind in fp8]
    ours, theirs = kept_by_all_linears("fp8"), kept_by_all_linears("bf16")
    rows.append(Row("kept: inputs of all Linears of an MoE layer", "bytes per token", ours, "bf16", theirs))
    ours, theirs = kept_by_a_layer("fp8"), kept_by_a_layer("bf16")
    rows.append(Row("kept: MoE layer of DeepSeek-V3, recompute", "KiB per token", ours / 2**22, "bf16", theirs / 2**22))
    return rows + row_bytes(HIDDEN, 8) + row_bytes(ModelConfig().hidden_size, ModelConfig().experts_per_token)


# -- errors ------------------------------------------------------------------------------------------------------------


OUTLIER = 1000.0


def activations(rows: int, outlier: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of normal numbers, times `outlier` by channel; with outliers every row has a size of its own."""
    x = torch.randn(rows, len(outlier), generator=generator) * outlier
    if outlier.max() > 1:
        x *= torch.randn(rows, 1, generator=generator).exp()
    return x.bfloat16().float()


def outliers(width: int, heavy: bool, generator: torch.Generator) -> Tensor:
    factors = torch.ones(width)
    if heavy:
        factors[torch.randperm(width, generator=generator)[: max(1, width // 64)]] = OUTLIER
    return factors


def errors_of(outputs: int, inputs: int, heavy: bool) -> dict[str, tuple[float, float]]:
    """Relative error of each product against FP64 (Frobenius norm): tiles and blocks, one scale per tensor."""
    generator, backend = torch.Generator().manual_seed(0), ReferenceBackend()
    of_x, of_dy = outliers(inputs, heavy, generator), outliers(outputs, heavy, generator)
    x, dy = activations(TOKENS, of_x, generator), activations(TOKENS, of_dy, generator)
    w = torch.randn(outputs, inputs, generator=generator) * 0.006 / of_x / of_dy.unsqueeze(1)
    fine = {
        "Fprop": (quantize_tiles(x), quantize_blocks(w)),
        "Dgrad": (quantize_tiles(dy), quantize_blocks(w).transposed()),
        "Wgrad": (quantize_transposed(dy), backend.requantize_transposed(quantize_tiles(x))),
    }
    coarse = {
        "Fprop": (quantize_tensor(x), quantize_tensor(w)),
        "Dgrad": (quantize_tensor(dy), quantize_tensor(w.t())),
        "Wgrad": (quantize_tensor(dy.t()), quantize_tensor(x.t())),
    }
    exact = {"Fprop": (x, w), "Dgrad": (dy, w.t()), "Wgrad": (dy.t(), x.t())}

    def error(operands: tuple[Quantized, Quantized], product: str) -> float:
        a, b = exact[product]
        wanted = a.double() @ b.double().t()
        # Per row, since with outliers a few rows are nearly all of the norm.
        difference = backend.gemm(*operands, torch.float32).double()[: len(wanted)] - wanted
        return float((difference.norm(dim=1) / wanted.norm(dim=1)).median())

    return {product: (error(fine[product], product), error(coarse[product], product)) for product in exact}


def measure_errors() -> list[Row]:
    rows = []
    for name, (outputs, inputs) in SHAPES.items():
        for heavy in (False, True):
            for product, (fine, coarse) in errors_of(outputs // SCALE_DOWN, inputs // SCALE_DOWN, heavy).items():
                case = f"{name}, {'heavy-tailed' if heavy else 'normal'}, {product}"
                rows.append(Row(case, "% error", 100 * fine, "one scale per tensor", 100 * coarse))
    return rows


PARTS = {"step": measure_step, "bytes": measure_bytes, "errors": measure_errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    for part in parser.parse_args().only.split(","):
        publish(f"fp8_{part}", PARTS[part]())


if __name__ == "__main__":
    main()
