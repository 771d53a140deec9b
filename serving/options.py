"""Settings from `key=value` words on the command line, as train.py takes them, over typed dataclasses.

Text is taken literally, so that `prompt=def f(x):` needs no second layer of quotes; everything else is YAML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING as REQUIRED
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Options = TypeVar("Options")


def parse_options(kind: type[Options], words: Sequence[str]) -> Options:
    """An instance of the dataclass `kind`. Raises ValueError for an unknown key or a value of the wrong type."""
    assert is_dataclass(kind)
    types = {f.name: str(f.type) for f in fields(kind)}
    config = OmegaConf.structured(kind)
    literal: dict[str, Any] = {}  # kept from OmegaConf, to which ${…} and ??? mean something
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not of the form key=value; keys are {', '.join(types)}")
        if key not in types:
            raise ValueError(f"{key!r} is unknown; keys are {', '.join(types)}")
        literal.pop(key, None)
        try:
            value: Any = "" if types[key].startswith("str") and text != "null" else yaml.safe_load(text)
            if value == "" and types[key].startswith("str"):
                literal[key] = text
            elif types[key] == "list[str]":
                literal[key], value = _texts(word, value), []
            OmegaConf.update(config, key, value)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"{word}: {str(error).splitlines()[0]}") from None
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{', '.join(f'{name}=…' for name in missing)} must be given")
    result: Any = OmegaConf.to_object(config)
    for key, value in literal.items():
        setattr(result, key, value)
    return result


def _texts(word: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        key = word.partition("=")[0]
        raise ValueError(f'{word}: write a list of texts, e.g. {key}=\'["one", "two"]\'')
    return value


def usage(doc: str | None, kind: type[Any]) -> str:
    """A module's docstring, and below it the keys of its options with their defaults."""
    lines = []
    for f in fields(kind):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        lines.append(f"    {f.name}={'' if default is REQUIRED else default}")
    return "\n".join([(doc or "").strip(), "", *lines])
