"""Which module computes in which format: the one table (report 3.3), shown by `python -m model describe precision=fp8`.

Formats of a linear layer:

    bf16       input, weight and gradients in BF16, accumulated in FP32
    fp8        input and gradient in E4M3 tiles of 1×128, weight in E4M3 blocks of 128×128, scales FP32
    fp8_pow2   the same with power-of-two scales for input and gradient: what has been quantised for the journey to
               the experts is quantised again without any loss
    fp8_e5m6   as fp8, but the input (power-of-two scales) is kept for Wgrad with 6 bits of mantissa in 12 bits: that of
               the Linear after the attention, which the report found sensitive

A linear layer's result is BF16 in any case. Weights are masters in FP32, quantised once per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class LinearFormat:
    """Whether scales are powers of two, for the input and for the gradient; and whether the input is kept as E5M6."""

    power_of_two_input: bool = False
    power_of_two_gradient: bool = False
    keeps_e5m6: bool = False


LINEAR_FORMATS: Mapping[str, LinearFormat] = MappingProxyType(
    {
        "fp8": LinearFormat(),
        "fp8_pow2": LinearFormat(power_of_two_input=True, power_of_two_gradient=True),
        "fp8_e5m6": LinearFormat(power_of_two_input=True, keeps_e5m6=True),
    }
)
_LINEAR = ("bf16", *LINEAR_FORMATS)


@dataclass(frozen=True)
class Entry:
    """A row of the table: the format of the report's recipe, the choices there are, and why."""

    format: str
    choices: tuple[str, ...]
    note: str


TABLE: Mapping[str, Entry] = MappingProxyType(
    {
        "embedding": Entry("bf16", ("bf16",), "a look-up; nothing is multiplied"),
        "norms": Entry("fp32", ("fp32",), "computed in FP32, returned as BF16"),
        "attention_query_down": Entry("fp8", _LINEAR, "shares its quantised input with key_value_down"),
        "attention_query_up": Entry("fp8", _LINEAR, ""),
        "attention_key_value_down": Entry("fp8", _LINEAR, ""),
        "attention_key_value_up": Entry("fp8", _LINEAR, ""),
        "attention_core": Entry("bf16", ("bf16",), "softmax(q·kᵀ)·v: FP32 on a CPU, flash attention on a GPU"),
        "attention_output": Entry("fp8_e5m6", _LINEAR, "its input is sensitive: kept in 12 bits"),
        "router": Entry("fp32", ("fp32",), "a wrong choice of expert costs more than its product"),
        "mlp_gate_up": Entry("fp8", _LINEAR, ""),
        "mlp_down": Entry("fp8", _LINEAR, ""),
        "shared_gate_up": Entry("fp8", _LINEAR, ""),
        "shared_down": Entry("fp8", _LINEAR, ""),
        "experts_gate_up": Entry("fp8_pow2", _LINEAR, "its input has come through the dispatch"),
        "experts_down": Entry("fp8_pow2", _LINEAR, "its gradient has come through combine's backward"),
        "swiglu": Entry("fp8", ("bf16", "fp8"), "inputs kept in E4M3, the output made again in backward"),
        "dispatch": Entry("fp8_pow2", ("bf16", "fp8_pow2"), "tokens forward; in backward gradients to experts.down"),
        "combine": Entry("bf16", ("bf16",), "sums over experts, and their way back"),
        "mtp_projection": Entry("fp8", _LINEAR, ""),
        "head": Entry("bf16", _LINEAR, "logits"),
        "gradients": Entry("fp32", ("fp32",), "of weights, accumulated over micro-batches and ranks"),
        "masters": Entry("fp32", ("fp32",), "the weights that the optimizer updates"),
    }
)


def complete(chosen: Mapping[str, str]) -> dict[str, str]:
    """The table with what the configuration says. Raises ValueError for a module or format that is not in it."""
    for module, name in chosen.items():
        if module not in TABLE:
            raise ValueError(f"precision.formats.{module}={name}: unknown module; choose one of {', '.join(TABLE)}")
        if name not in TABLE[module].choices:
            raise ValueError(f"precision.formats.{module}={name} must be {' or '.join(TABLE[module].choices)}")
    return {module: chosen.get(module, entry.format) for module, entry in TABLE.items()}


def describe_formats(formats: Mapping[str, str]) -> str:
    """The table as text."""
    rows = [(module, formats[module], entry.note) for module, entry in TABLE.items()]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{m:{widths[0]}}  {f:{widths[1]}}  {note}".rstrip() for m, f, note in rows)
