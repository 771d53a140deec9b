"""FP8 backends by name (`precision.backend=`). A new one is one file, and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from model.fp8.backend import Backend
from model.fp8.reference import ReferenceBackend

BACKENDS: Mapping[str, Callable[[], Backend]] = MappingProxyType(
    {
        "reference": ReferenceBackend,
    }
)


def make_backend(name: str) -> Backend:
    """Raises ValueError for an unknown name, or for a backend that cannot run here, saying why."""
    if name not in BACKENDS:
        raise ValueError(f"precision.backend={name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name]()
