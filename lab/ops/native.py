"""Loads the C++ kernels of csrc/ and makes every call into them.

They are plain functions on pointers in a shared library, one for each instruction set, built when lab is installed; the best one that this
processor has is loaded. `why_not()` says why there is none. `call` checks every tensor: a wrong pointer would end the process.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.ops.backend import exporting

FOLDER = Path(__file__).parent
LEVELS = {  # instruction sets that a library may need, the best one first, with the flags of /proc/cpuinfo that tell
    "x86_64_v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86_64_v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"},
    "x86_64": set[str](),
}
NAMES = {torch.float32: "float32", torch.float64: "float64", torch.complex64: "complex64", torch.complex128: "complex128"}

_threads: int | None = None  # a limit on the kernels' threads: 1 in a forked process


def load() -> tuple[ctypes.CDLL | None, str]:
    """The library and its instruction set, or None and the reason."""
    machine = platform.machine()
    levels = [level for level, flags in LEVELS.items() if flags <= cpu_flags()] if machine in ("x86_64", "AMD64") else [machine]
    for level in levels:
        file = FOLDER / f"cpu_{level}.so"
        if file.exists():
            try:
                return ctypes.CDLL(str(file)), level
            except OSError as error:
                return None, f"{file.name} does not load: {error}"
    return None, "the C++ kernels are not built: installing lab with a C++ compiler at hand builds them"


def cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


LIBRARY, SAYS = load()  # what was loaded, and its instruction set or the reason why there is none
VECTOR_BYTES = LIBRARY.vector_bytes() if LIBRARY is not None else 0


def width(dtype: torch.dtype) -> int:
    """How many numbers of a real dtype a vector of the loaded library holds; some buffers are laid out in whole vectors."""
    return VECTOR_BYTES // dtype.itemsize


def why_not(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> str | None:
    """The reason why the kernels cannot compute with these tensors, or None."""
    if LIBRARY is None:
        return SAYS
    if exporting():
        return "an exported file must run without lab's kernels"
    given = [t for t in tensors if t is not None]
    if any(t.device.type != "cpu" for t in given):
        return f"a tensor is on {next(t.device for t in given if t.device.type != 'cpu')}, the C++ kernels compute on the CPU"
    if given[0].dtype not in dtypes:
        return f"{given[0].dtype} is not among {', '.join(map(str, dtypes))}"
    return None


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | None) -> int:
    """name_dtype(pointers and integers ..., threads). Tensors must be contiguous, on the CPU and of `dtype`; None is a null pointer."""
    values: list[Any] = []
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            if argument.dtype != dtype or argument.device.type != "cpu" or not argument.is_contiguous():
                raise ValueError(
                    f"{name}: argument {i} must be a contiguous {dtype} tensor on the CPU, got {argument.dtype} on {argument.device} "
                    f"with strides {argument.stride()}"
                )
            values.append(ctypes.c_void_p(argument.data_ptr()))
        else:
            values.append(argument if argument is None else ctypes.c_int64(argument))
    threads = _threads or torch.get_num_threads()
    return function(f"{name}_{NAMES[dtype]}")(*values, ctypes.c_int64(threads))  # `arguments` keeps the tensors alive until it returns


@cache
def function(name: str) -> Any:
    if LIBRARY is None:
        raise RuntimeError(SAYS)
    loaded = getattr(LIBRARY, name)
    loaded.restype = ctypes.c_int64
    return loaded


def _forked() -> None:
    """OpenMP's threads do not survive a fork: more than one would wait for ever."""
    global _threads
    _threads = 1


os.register_at_fork(after_in_child=_forked)
