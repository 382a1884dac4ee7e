"""The allocator of the CPU's memory: its name, and the setting `trainer.reuse_memory`.

glibc maps every tensor above 32 MB afresh and gives it back when it is freed; the kernel then clears its pages again, 2 us each. With
`reuse_memory` freed memory stays with the process, to be used for the next tensor: faster for long sequences, at the price of memory that
others cannot have. It does nothing for a GPU's memory, and does not change a result.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
REUSED = {M_TRIM_THRESHOLD: -1, M_MMAP_MAX: 0}  # never given back, never mapped apart
# By itself glibc moves both thresholds up with the largest block freed so far, until it is once told one. So afterwards it is told where
# they end in a process that has used large tensors.
AFTERWARDS = {M_TRIM_THRESHOLD: 64 << 20, M_MMAP_THRESHOLD: 32 << 20, M_MMAP_MAX: 65536}
VARIABLES = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

_reused = False


def allocator() -> str:
    """What a reported speed or peak memory should name: 'glibc 2.36', 'glibc 2.36, memory reused', 'jemalloc'."""
    own = replaced()
    if own is not None:
        return own
    name = f"glibc {_glibc()}" if _glibc() else f"that of {platform.system()}"
    settings = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return ", ".join([name, *(["memory reused"] if _reused else []), *settings])


def replaced() -> str | None:
    """The allocator that stands in for the system's in this process (LD_PRELOAD), or None."""
    maps = Path("/proc/self/maps")
    found = re.search(r"/lib(jemalloc|tcmalloc|mimalloc)", maps.read_text() if maps.exists() else "")
    return found[1] if found else None


def why_not_reuse() -> str | None:
    """The reason why `reusing_memory` has nothing to set here, or None."""
    if _glibc() is None or replaced() is not None:
        return f"it is a setting of glibc's allocator, and the one here is {allocator()}; leave it false"
    return None


@contextmanager
def reusing_memory() -> Iterator[None]:
    """`trainer.reuse_memory` for the block. Afterwards what was kept is given back, and glibc maps blocks above 32 MB apart, as it does in
    any process that has used large tensors, unless the block left a hole in the heap that they fit.

    Raises RuntimeError where `why_not_reuse` has a reason.
    """
    reason = why_not_reuse()
    if reason is not None:
        raise RuntimeError(f"reuse_memory: {reason}")
    global _reused
    _set(REUSED)
    _reused = True
    try:
        yield
    finally:
        _set(AFTERWARDS)
        _reused = False
        _libc().malloc_trim(0)


def _set(values: Mapping[int, int]) -> None:
    for name, value in values.items():
        if _libc().mallopt(name, value) != 1:
            raise RuntimeError(f"reuse_memory: glibc refuses mallopt({name}, {value})")


def _libc() -> Any:
    return ctypes.CDLL(None)


def _glibc() -> str | None:
    """Its version; None with another C library."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ") or None
    except (AttributeError, ValueError, OSError):  # Windows, macOS, musl
        return None
