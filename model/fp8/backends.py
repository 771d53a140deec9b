"""FP8 backends by name (`precision.backend=`). A new one is one file, and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from model.fp8.backend import Backend
from model.fp8.reference import ReferenceBackend
from model.fp8.torch_backend import TorchBackend


def _triton() -> Backend:
    try:
        from model.fp8.triton_backend import TritonBackend
    except ImportError as error:
        raise ValueError(
            f"precision.backend=triton needs Triton: pip install -e '.[triton]' ({error}); or use "
            "precision.backend=reference"
        ) from error
    return TritonBackend()


BACKENDS: Mapping[str, Callable[[], Backend]] = MappingProxyType(
    {
        "reference": ReferenceBackend,
        "triton": _triton,
        "torch": TorchBackend,
    }
)


def make_backend(name: str) -> Backend:
    """Raises ValueError for an unknown name, or for a backend that cannot run here, saying why."""
    if name not in BACKENDS:
        raise ValueError(
            f"precision.backend={name!r} is unknown; choose one of {', '.join(BACKENDS)}, transformer_engine"
        )
    return BACKENDS[name]()
