"""How long the matrix products of DeepSeek-V3 take on an H100 at best, in FP8 and in BF16: arithmetic, nothing is run.

    .venv/bin/python -m benchmarks.fp8_roofline

4,096 tokens per rank, EP 64 in balance: 8 · 4,096 rows for the rank's 4 experts. A product takes as long as its
operations at the peak of the tensor cores, or as its operands and result at the bandwidth of the memory, whichever is
longer: every operand is read once, scales are left out (3 %), results are BF16 (FP32, read and written, for Wgrad).
"""

from __future__ import annotations

from benchmarks.fp8 import SHAPES
from benchmarks.report import Row, publish

FP8_FLOPS, BF16_FLOPS, BANDWIDTH = 1979e12, 989.5e12, 3.35e12  # H100 SXM5 data sheet, dense; bytes per second
TOKENS, EXPERTS, TOP = 4096, 4, 8


def seconds(M: int, N: int, K: int, groups: int, operand: int, result: int, peak: float) -> float:
    """For `groups` products [M, K] · [N, K]ᵀ with operands and results of so many bytes per element."""
    flops = 2 * M * N * K * groups / peak
    memory = groups * (operand * (M + N) * K + result * M * N) / BANDWIDTH
    return max(flops, memory)


def rows_of(name: str, outputs: int, inputs: int) -> list[Row]:
    routed = name.startswith("expert")
    groups, tokens = (EXPERTS, TOKENS * TOP // EXPERTS) if routed else (1, TOKENS)
    sizes = {
        "Fprop": (tokens, outputs, inputs, groups),
        "Dgrad": (tokens, inputs, outputs, groups),
        "Wgrad": (outputs, inputs, tokens, groups),
    }
    rows = []
    for product, (M, N, K, G) in sizes.items():
        result = 8 if product == "Wgrad" else 2
        fp8, bf16 = seconds(M, N, K, G, 1, result, FP8_FLOPS), seconds(M, N, K, G, 2, result, BF16_FLOPS)
        rows.append(Row(f"{name}, {product}", "µs", 1e6 * fp8, "bf16", 1e6 * bf16))
    return rows


def main() -> None:
    publish("fp8_roofline", [row for name, shape in SHAPES.items() for row in rows_of(name, *shape)])


if __name__ == "__main__":
    main()
