"""Precisions by name (`precision=`). A new one is one file, and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from model.fp8.backends import BACKENDS, make_backend
from model.fp8.precision import Fp8Precision
from model.fp8.reference import ReferenceBackend
from model.fp8.transformer_engine import TransformerEngineOnPaper, TransformerEnginePrecision
from model.precision import CastPrecision, Precision


@dataclass
class PrecisionConfig:
    name: str = "fp32"
    backend: str = "reference"  # of fp8: who quantises and multiplies (model/fp8/backends.py), or transformer_engine
    formats: dict[str, str] = field(default_factory=dict)  # of fp8: module → format (model/fp8/formats.py)
    gradient_blocks: bool = False  # of fp8: activation gradients in 128×128 blocks, the report's ablation


def _cast(dtype: torch.dtype) -> Callable[[PrecisionConfig, bool, bool], Precision]:
    return lambda config, here, compiled: CastPrecision(dtype, compiled)


def _fp8(config: PrecisionConfig, here: bool, compiled: bool) -> Precision:
    if config.gradient_blocks and config.backend != "reference":
        raise ValueError(f"precision.gradient_blocks=true needs precision.backend=reference, not {config.backend}")
    own_layers = config.backend == "transformer_engine"  # it has layers of its own, so it is no backend of ours
    if own_layers and here:
        return TransformerEnginePrecision(config.formats)
    if own_layers:
        return TransformerEngineOnPaper(config.formats)
    backend = make_backend(config.backend) if here or config.backend not in BACKENDS else ReferenceBackend()
    return Fp8Precision(backend, config.formats, config.gradient_blocks)


# Name → how it is made, and the dtype of the parameters. fp64 is for exactness checks.
PRECISIONS: Mapping[str, tuple[Callable[[PrecisionConfig, bool, bool], Precision], torch.dtype]] = MappingProxyType(
    {
        "fp32": (_cast(torch.float32), torch.float32),
        "bf16": (_cast(torch.bfloat16), torch.float32),
        "fp8": (_fp8, torch.float32),
        "fp64": (_cast(torch.float64), torch.float64),
    }
)


def make_precision(
    config: PrecisionConfig | str, here: bool = True, compiled: bool = False
) -> tuple[Precision, torch.dtype]:
    """The precision of a configuration, or by name alone, and the dtype in which it wants the parameters.

    here       it is to compute on this machine, whose devices and packages matter then; else it is for a look at the
               formats, and the reference backend stands in for what may be missing
    compiled   with our C++ kernels, where they take the operands (FP32 and BF16 on a CPU); FP8 has its backends

    Raises ValueError for an unknown name, backend, module or format, or for a setting that only fp8 has.
    """
    if isinstance(config, str):
        config = PrecisionConfig(config)
    if config.name not in PRECISIONS:
        raise ValueError(f"precision.name={config.name!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    for name in ("formats", "gradient_blocks"):
        if config.name != "fp8" and getattr(config, name):
            raise ValueError(f"precision.{name}={getattr(config, name)} is for precision=fp8, not {config.name}")
    make, parameters = PRECISIONS[config.name]
    return make(config, here, compiled), parameters
