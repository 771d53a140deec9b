"""How the C library's allocator treats freed memory: on a CPU it is kept, instead of being given back at every step.

glibc returns large blocks to the kernel as soon as they are freed, and every page of the next one is then cleared
and mapped anew. A training step frees and asks for the same sizes again.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from its heap and never to shrink it. The process stays as large as it once was.

    Returns False where the C library has no such call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
