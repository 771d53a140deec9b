"""`python -m model describe model=deepseek_v3_671b [model.num_layers=…] [seq=4096] [batch=1] [pp=16] [dp=128] …`

Prints a model's parameters, FLOPs per token and memory per rank. Nothing is allocated. With precision=fp8
[precision.formats.MODULE=FORMAT] also which module computes in which format.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from model.config import ModelConfig
from model.describe import (
    Layout,
    attention_flops,
    cache_bytes,
    count_parameters,
    rank_memory,
    training_flops,
)
from model.fp8.formats import describe_formats
from model.fp8.precision import Fp8Precision
from model.precisions import PrecisionConfig, make_precision

PRESETS = Path(__file__).parent.parent / "conf" / "model"


def load_preset(name: str, overrides: dict[str, Any] | None = None) -> ModelConfig:
    """A configuration of conf/model by name. Raises ValueError for an unknown name, key or value."""
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ValueError(f"model={name} is unknown; choose one of {known}")
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    values.pop("defaults", None)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), values, overrides or {})
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ModelConfig)
    config.check()
    return config


def describe(config: ModelConfig, seq_len: int, layout: Layout, batch: int = 1) -> str:
    """The table, as text, for micro-batches of `batch` sequences."""
    p, memory = count_parameters(config), rank_memory(config, layout, batch * seq_len)
    rows: list[tuple[str, str]] = [
        ("embedding", _short(p.embedding)),
        ("output head", _short(p.head)),
        ("attention", _short(p.attention)),
        ("dense MLPs, routers, norms", _short(p.dense)),
        ("shared experts", _short(p.shared)),
        ("routed experts", f"{_short(p.routed)}, of which a token uses {_short(p.active_routed)}"),
        ("total", _short(p.main)),
        ("active per token", _short(p.active)),
        ("MTP modules", f"{_short(p.mtp)}, active {_short(p.mtp_active)}" if p.mtp else "none"),
        ("", ""),
        (f"FLOPs per trained token, sequence {seq_len}", _short(training_flops(config, seq_len))),
        ("  of which attention core", _short(3 * attention_flops(config, seq_len))),
        ("key-value cache per token", f"{cache_bytes(config):,} bytes"),
        ("", ""),
        (
            "layout",
            f"PP {layout.pp} × DP {layout.dp}, EP {layout.ep}, {'two' if layout.mirrored else 'one'} direction(s)",
        ),
        (f"parameters on the fullest rank, {memory.rank} of the pipeline", _short(memory.parameters)),
        ("  weights: FP32 masters, BF16 copies", _gib(memory.weights)),
        ("  gradients, FP32", _gib(memory.gradients)),
        (f"  Adam, FP32{', sharded over copies' if layout.zero else ''}", _gib(memory.optimizer)),
        (f"  activations, BF16, {memory.micro_batches} × {batch} × {seq_len} tokens", _gib(memory.activations)),
        ("  together", _gib(memory.total)),
        ("what passes, traffic, bubble", "python train.py dry_run=true model=…, for any schedule and precision"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}".rstrip() for name, value in rows)


def _short(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.2f}{unit}"
    return f"{number:.0f}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def describe_precision(words: Sequence[str]) -> str:
    """The table of formats for `precision=` and `precision.*` among the words; nothing if there is no precision."""
    chosen = [word.partition("=")[2] for word in words if word.startswith("precision=")]
    if not chosen:
        alone = next((word for word in words if word.startswith("precision.")), None)
        if alone is not None:
            raise ValueError(f"{alone}: of which precision? Give precision=fp8 as well")
        return ""
    more = OmegaConf.from_dotlist([w.removeprefix("precision.") for w in words if w.startswith("precision.")])
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PrecisionConfig(chosen[-1])), more))
    assert isinstance(config, PrecisionConfig)
    precision, masters = make_precision(config, here=False)
    if not isinstance(precision, Fp8Precision):
        return f"\n\nprecision={config.name}: every product in {precision.dtype}, masters in {masters}"
    return f"\n\nprecision=fp8 by the {config.backend} backend\n{describe_formats(precision.formats)}"


def _whole_number(settings: dict[Any, Any], name: str, default: int) -> int:
    value = settings.pop(name, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={'' if value is None else value} must be a whole number, at least 1")
    return value


def main(arguments: list[str]) -> int:
    usage = (__doc__ or "").splitlines()[0].strip("`")
    if not arguments or arguments[0] != "describe":
        print(f"usage: {usage}", file=sys.stderr)
        return 2
    try:
        settings = dict(OmegaConf.to_container(OmegaConf.from_dotlist(arguments[1:])) or {})  # type: ignore[arg-type]
        overrides: dict[str, Any] = {}
        name, seq_len, batch = "tiny", _whole_number(settings, "seq", 4096), _whole_number(settings, "batch", 1)
        for word in arguments[1:]:
            key, _, value = word.partition("=")
            if key == "model":
                name = value
            elif key.startswith("model."):
                overrides[key.removeprefix("model.")] = value
        settings.pop("model", None)
        settings.pop("precision", None)
        formats = describe_precision(arguments[1:])
        unknown = sorted(set(settings) - {f.name for f in fields(Layout)})
        if unknown:
            known = "model, model.*, precision, precision.*, seq, batch, pp, dp, ep, mirrored, zero"
            raise ValueError(f"{unknown[0]}: unknown; known are {known}")
        layout = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Layout), settings))
        assert isinstance(layout, Layout)
        print(describe(load_preset(name, overrides), seq_len, layout, batch), formats, sep="")
    except (ValueError, OmegaConfBaseException, YAMLError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
