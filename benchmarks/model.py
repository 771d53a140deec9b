"""Training speed of the model against transformers' DeepseekV3ForCausalLM.

    .venv/bin/python -m benchmarks.model [--rounds 5] [--case 0]     case: one size; the other's results stay
    .venv/bin/python -m benchmarks.model --compile-peer              the peer a second time, through torch.compile
    .venv/bin/python -m benchmarks.model --default-allocator         the peer alone, with glibc's defaults, then ours

One process, two threads; the same configuration, weights, tokens and AdamW (torch's fused one). Ours and the peer's
steps are taken in turns, and the medians are compared. A step is forward, backward and optimizer. Freed memory is kept
(model/cpu/allocator.py), as train.py does: without it the peer, which allocates more, pays for what is in the process.

    fp32   both compute in FP32
    bf16   ours: FP32 masters, BF16 products. The peer twice: the same under autocast, and with all of it in BF16

Ours is measured with compile=on and with compile=off, the peer as it is and, with --compile-peer, with torch.compile on
each of its layers too; all in turns in the same run.

The second table has the share of the machine's GEMM peak (the best of products like the model's, measured here, by
torch and by oneDNN) that the step's multiplications with weights reach, where the time goes, and the limit: what all
products alone would take at that peak, against half of the FP32 or autocast peer's step.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch.profiler import profile

from benchmarks.peer import our_model, peer_model, weights_of
from benchmarks.report import RESULTS, Row, publish
from model.batch import MicroBatch
from model.config import ModelConfig
from model.cpu.allocator import keep_freed_memory
from model.describe import attention_flops, count_parameters
from model.products import product

THREADS = 2
SMALL = ModelConfig(
    vocab_size=8192, num_layers=6, num_dense_layers=1, hidden_size=512, dense_ffn_size=1536, num_heads=8,
    query_rank=256, key_value_rank=128, head_dim=64, rope_dim=32, value_dim=64, num_experts=32, experts_per_token=4,
    expert_ffn_size=256, num_groups=8, groups_per_token=4,
)  # fmt: skip
LARGE = replace(SMALL, num_experts=64, experts_per_token=6)


@dataclass(frozen=True)
class Case:
    name: str
    config: ModelConfig
    seq_len: int
    batch: int = 4

    @property
    def tokens(self) -> int:
        return self.seq_len * self.batch


CASES = (Case("32 experts, top-4, 4 × 512", SMALL, 512), Case("64 experts, top-6, 4 × 1024", LARGE, 1024))


def random_batch(case: Case) -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, case.config.vocab_size, (case.batch, case.seq_len + 1), generator=generator)
    zeros = torch.zeros(case.batch, case.seq_len, dtype=torch.int64)
    positions = torch.arange(case.seq_len).expand(case.batch, -1)
    return MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), zeros, positions, 1 / case.tokens)


def adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def our_step(case: Case, precision: str, compiled: bool = False) -> Callable[[], float]:
    replica, batch = our_model(case.config, precision, compiled=compiled), random_batch(case)
    optimizer = adamw(replica.stages[0].parameters())

    def step() -> float:
        optimizer.zero_grad()
        (loss,) = replica.pipeline.step([batch]).values()
        optimizer.step()
        replica.precision.refresh()
        return float(loss.sum())

    return step


def peer_step(case: Case, dtype: torch.dtype, autocast: bool, compiled: bool = False) -> Callable[[], float]:
    weights = weights_of(our_model(case.config, "fp32").stages[0])
    peer, batch = peer_model(case.config, weights, dtype).train(), random_batch(case)
    if compiled:
        for layer in peer.model.layers:
            layer.compile()
    optimizer = adamw(peer.parameters())

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = peer(
                input_ids=batch.tokens_BS, labels=batch.tokens_BS, shift_labels=batch.targets_BS, use_cache=False
            )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(out.loss.detach())

    return step


def seconds(step: Callable[[], float]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


PEERS = MappingProxyType(
    {
        "fp32": {"transformers, FP32": (torch.float32, False)},
        "bf16": {"transformers, autocast": (torch.float32, True), "transformers, all BF16": (torch.bfloat16, False)},
    }
)


def compare_as_it_comes(rounds: int) -> list[Row]:
    """The peer before anything of ours is in the process, with glibc's defaults; then ours, keeping freed memory."""
    case = CASES[0]
    peers = {name: kind for kinds in PEERS.values() for name, kind in kinds.items()}
    theirs = {name: _speed_alone(partial(peer_step, case, *kind), case, rounds) for name, kind in peers.items()}
    keep_freed_memory()
    ours = {precision: _speed_alone(partial(our_step, case, precision), case, rounds) for precision in PEERS}
    return [
        Row(f"{case.name}, {precision}", "tokens/s", ours[precision], name, theirs[name])
        for precision, kinds in PEERS.items()
        for name in kinds
    ]


def _speed_alone(make: Callable[[], Callable[[], float]], case: Case, rounds: int) -> float:
    gc.collect()
    step = make()
    times = [seconds(step) for _ in range(rounds + 3)][3:]
    return case.tokens / statistics.median(times)


OURS = ("compile=on", "compile=off")


def compare(case: Case, rounds: int, compile_peer: bool) -> list[Row]:
    """Tokens per second of ours, both ways, against each peer, steps taken in turns after two to warm up."""
    rows = []
    for precision, kinds in PEERS.items():
        steps = {name: our_step(case, precision, name == "compile=on") for name in OURS}
        for name, kind in kinds.items():
            steps[name] = peer_step(case, *kind)
            if compile_peer:
                steps[f"{name}, compiled"] = peer_step(case, *kind, compiled=True)
        losses = {name: [step(), step()] for name, step in steps.items()}
        for name, values in losses.items():
            if abs(values[0] - losses["compile=off"][0]) > 0.01 * values[0]:
                raise RuntimeError(f"{name} does not compute what ours does: {losses}")
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                times[name].append(seconds(step))
        speed = {name: case.tokens / statistics.median(values) for name, values in times.items()}
        rows += [
            Row(f"{case.name}, {precision}, {ours}", "tokens/s", speed[ours], name, speed[name])
            for ours in OURS
            for name in steps
            if name not in OURS
        ]
        del steps
        gc.collect()
    return rows


# -- the machine's limit, and where the time goes ----------------------------------------------------------------------


def gemm_peak(dtype: torch.dtype) -> tuple[float, float]:
    """Best GFLOP/s of products like the model's: (by `product`, by torch alone)."""
    best = [0.0, 0.0]
    for rows, inner, columns in ((2048, 512, 1024), (2048, 256, 768), (256, 512, 512)):
        a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
        for i, multiply in enumerate((lambda a=a, b=b: product(a, b), lambda a=a, b=b: a @ b.t())):
            multiply()
            times = []
            for _ in range(9):
                start = time.perf_counter()
                multiply()
                times.append(time.perf_counter() - start)
            best[i] = max(best[i], 2e-9 * rows * inner * columns / min(times))
    return best[0], best[1]


SMALL_FUNCTIONS = ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "token_losses")
GROUPED = ("deepseek_cpu::grouped_product", "deepseek_cpu::add_grouped_weight_grads")


def where_time_goes(case: Case, precision: str, peer_speed: float) -> dict[str, float]:
    """Milliseconds of one step (compile=on) by kind of operation, and the share of the GEMM peak; peer in tokens/s."""
    step = our_step(case, precision, compiled=True)
    step()
    step()
    elapsed = statistics.median(seconds(step) for _ in range(3))
    with profile() as measured:
        step()
    kinds = {
        "products": ("mkldnn::_linear_pointwise", "aten::mm", "aten::bmm", "aten::addmm_", *GROUPED),
        "attention": ("deepseek_cpu::attend", "deepseek_cpu::attend_backward"),
        "copies and casts": ("aten::copy_", "aten::index", "aten::index_select", "aten::index_add_", "aten::cat"),
        "norms, SwiGLU, loss": tuple(f"deepseek_cpu::{name}" for name in SMALL_FUNCTIONS),
        "optimizer, zeros": ("aten::_fused_adamw_", "aten::fill_"),
    }
    events = {e.key: e.self_cpu_time_total / 1e3 for e in measured.key_averages()}
    table = {kind: sum(events.get(name, 0.0) for name in names) for kind, names in kinds.items()}
    table["all else"] = sum(events.values()) - sum(table.values())
    counts = count_parameters(case.config)
    flops = 6.0 * (counts.active - counts.embedding) * case.tokens
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    peak, by_torch = gemm_peak(dtype)
    print(f"\n{case.name}, {precision}: {1e3 * elapsed:.0f} ms per step. Share of the GEMM peak of {peak:.0f} GFLOP/s")
    print(f"(torch's own: {by_torch:.0f}): {flops / elapsed / 1e9 / peak:.2f}, attention's products not counted.")
    floor, half = 1e3 * (flops / 1e9 + attention_gflops(case)) / peak, 5e2 * case.tokens / peer_speed
    print(f"At that peak all products alone take {floor:.0f} ms; half of the peer's step is {half:.0f} ms.")
    total = sum(table.values())
    for kind, value in table.items():
        print(f"  {kind:20}{value:8.0f} ms  {value / total:5.1%}")
    table |= {"step_ms": 1e3 * elapsed, "gemm_peak_gflops": peak, "torch_gemm_gflops": by_torch}
    table |= {"products_at_peak_ms": floor, "half_of_peer_ms": half}
    return table | {"share_of_peak": flops / elapsed / 1e9 / peak, "attention_gflops": attention_gflops(case)}


def attention_gflops(case: Case) -> float:
    """Of a step's attention core, causal: what is needed, not what masked blocks or recomputation add."""
    return 3e-9 * attention_flops(case.config, case.seq_len) * case.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help="one size alone")
    parser.add_argument("--compile-peer", action="store_true", help="also the peer with its layers compiled")
    parser.add_argument("--default-allocator", action="store_true", help="peer alone as it comes, then ours, instead")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(THREADS)
    if options.default_allocator:
        publish("model_default_allocator", compare_as_it_comes(options.rounds))
        return
    keep_freed_memory()
    for case in CASES if options.case is None else (CASES[options.case],):
        measure(case, options.rounds, options.compile_peer)


def measure(case: Case, rounds: int, compile_peer: bool) -> None:
    """One size, into the results, where those of the other size stay."""
    rows = compare(case, rounds, compile_peer)
    file, times = RESULTS / "model.json", RESULTS / "model_time.json"
    known = json.loads(file.read_text())["rows"] if file.exists() else []
    others = [Row(**{k: v for k, v in row.items() if k != "ratio"}) for row in known]
    rows += [row for row in others if not row.case.startswith(case.name)]
    publish("model", sorted(rows, key=lambda row: row.case))
    tables = json.loads(times.read_text()) if times.exists() else {}
    for precision, kinds in PEERS.items():
        name = f"{case.name}, {precision}"
        peer = next(row.theirs for row in rows if row.case.startswith(name) and row.peer in kinds)
        tables[name] = where_time_goes(case, precision, peer)
    times.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
