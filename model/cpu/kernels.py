"""Our C++ kernels for CPUs with AVX-512 (`compile=on`): built when first asked for, then kept in torch's folder of
extensions (`TORCH_EXTENSIONS_DIR`, else `~/.cache/torch_extensions`). One process builds and the others wait for it.

Each thread multiplies tiles for itself: oneDNN's product of one tile, which torch exports, or our own (`registers.h`),
where numbers of rows are new every time. A product that two threads share, as torch's and oneDNN's own calls do it,
waits for the slower of them every fifty microseconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "deepseek_cpu"
FLAGS = ("-O3", "-std=c++20", "-fopenmp", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
DEFINES = ("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512")  # of torch's vectors, ATen/cpu/vec
COMPILER = "c++"


def suits(x: Tensor) -> bool:
    """Whether the kernels take this tensor: FP32 or BF16 on a CPU with AVX-512, in a torch with oneDNN."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and _suits_here()


@cache
def _suits_here() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def kernels() -> Any:
    """`torch.ops.deepseek_cpu`, with the operators that the C++ files define at their ends.

    Raises RuntimeError if there is no C++ compiler, or if it fails.
    """
    if shutil.which(COMPILER) is None:
        raise RuntimeError(f"compile=on needs a C++ compiler, and there is no {COMPILER!r}: install g++, or use off")
    from torch.utils.cpp_extension import get_default_build_root, load

    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.cpp"))
    flags = [*FLAGS, *DEFINES, *(["-mavx512bf16"] if torch.cpu._is_avx512_bf16_supported() else [])]
    content = b"".join(path.read_bytes() for path in (*sources, *sorted(folder.glob("*.h")))) + " ".join(flags).encode()
    name = f"{NAMESPACE}_{hashlib.sha256(content).hexdigest()[:12]}"  # so two versions can be used side by side
    build = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / name
    with _alone_in(build):
        load(name, [str(path) for path in sources], flags, extra_ldflags=["-fopenmp"], build_directory=str(build),
             is_python_module=False)  # fmt: skip
    return getattr(torch.ops, NAMESPACE)


@contextmanager
def _alone_in(build: Path) -> Iterator[None]:
    """Hold a lock that ends with its process. Torch's own is a file, which a killed build leaves behind, and for which
    every later process would wait for ever."""
    build.mkdir(parents=True, exist_ok=True)
    with (build / "building").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (build / "lock").unlink(missing_ok=True)
        yield
