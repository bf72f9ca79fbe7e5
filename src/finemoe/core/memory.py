"""Process memory: keep freed pages on CPU, and read the peak."""

from __future__ import annotations

import ctypes
import resource
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEEP_BYTES = 1 << 30


def keep_freed_pages() -> bool:
    """Ask glibc to keep freed memory in the process instead of returning it to the system.

    A training step frees and asks for the same large buffers again. With glibc's defaults each of them is a fresh
    mapping whose pages fault one by one: up to a third of a small step. True when the setting took effect (glibc only).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl and others have no mallopt
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))


def peak_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
