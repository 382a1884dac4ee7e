"""Loads C++ kernels, those of csrc/ and your own, and makes every call into them.

They are plain functions on pointers in a shared library. Those of csrc/ are built when lab is installed, one library for each instruction
set; the best one that this processor has is loaded, and `why_not()` says why there is none. `Library` is one of your own. A call checks
every tensor: a wrong pointer would end the process.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.compiler import NoLibrary, compile_once, digest, levels_here, own_sources, rebuild_command
from lab.ops.backend import exporting

FOLDER = Path(__file__).parent
NAMES = {torch.float32: "float32", torch.float64: "float64", torch.complex64: "complex64", torch.complex128: "complex128"}

# Multiply-adds for each thread, about 100 microseconds. To wake a thread takes 5, or 10,000 where its core has other work: a decode step
# must not wait for that.
GRAIN = 1 << 20
_threads: int | None = None  # a limit on the kernels' threads: 1 in a forked process


def load(folder: Path = FOLDER, sources: Sequence[Path] | None = None) -> tuple[ctypes.CDLL | None, str]:
    """The library and its instruction set, or None and the reason.

    In a checkout it must have been built from the sources that are there: Python code and kernels of two versions would not fit.
    """
    for level in levels_here():
        file = folder / f"cpu_{level}.so"
        if not file.exists():
            continue
        try:
            library = ctypes.CDLL(str(file))
            built = made_of(library)["sources"]
        except (OSError, AttributeError) as error:
            return None, f"{file.name} does not load ({error}); {rebuild_command()}"
        wanted = own_sources() if sources is None else sources
        if wanted and built != digest(wanted):
            return None, f"{file.name} was built from other sources than csrc/ holds now; {rebuild_command()}"
        return library, level
    return None, "the C++ kernels are not built: installing lab with a C++ compiler at hand builds them"


def made_of(library: ctypes.CDLL) -> dict[str, str]:
    """What one of lab's own libraries was built from, by what, and whether it has threads. AttributeError of any other library."""
    library.made_of.restype = ctypes.c_char_p
    return dict(zip(("sources", "compiler", "threads"), library.made_of().decode().split("|"), strict=True))


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


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | None, work: int) -> int:
    """name_dtype(pointers and integers ..., threads). Tensors must be contiguous, on the CPU and of `dtype`; None is a null pointer.
    work: about how many multiply-adds the call takes, for `threads_for`."""
    return _call(function(f"{name}_{NAMES[dtype]}"), name, dtype, arguments, threads_for(work))


def threads_for(work: int) -> int:
    """The threads for so many multiply-adds: torch's number at most, and each of them has GRAIN to do. Results do not depend on it."""
    return max(1, min(allowed_threads(), work // GRAIN))


def allowed_threads() -> int:
    return _threads or torch.get_num_threads()


@cache
def function(name: str) -> Any:
    if LIBRARY is None:
        raise RuntimeError(SAYS)
    loaded = getattr(LIBRARY, name)
    loaded.restype = ctypes.c_int64
    return loaded


def _call(run: Any, name: str, dtype: torch.dtype, arguments: Sequence[Tensor | int | None], threads: int) -> int:
    values: list[Any] = []
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            if argument.dtype != dtype or argument.device.type != "cpu" or not argument.is_contiguous() or argument.is_conj():
                raise ValueError(
                    f"{name}: argument {i} must be a contiguous {dtype} tensor on the CPU, got {argument.dtype} on {argument.device} "
                    f"with strides {argument.stride()}"
                )
            values.append(ctypes.c_void_p(argument.data_ptr()))
        else:
            values.append(argument if argument is None else ctypes.c_int64(argument))
    return run(*values, ctypes.c_int64(threads))  # `arguments` keeps the tensors alive until it returns


class Library:
    """Kernels of your own: a shared library, or one C++ source that is compiled at the first use (and again when it changes).

    file: PATH.so or PATH.cpp, with functions `extern "C" int64_t NAME_DTYPE(pointers ..., int64_t sizes ..., int64_t threads)`; the
    result may be void. names: those that an op needs, such as "leaky", which stands for leaky_float32 and the like.
    Nothing is loaded before a call of an op asks `why_not`.
    """

    def __init__(self, file: str | Path, *names: str) -> None:
        self.file, self.names = Path(file).absolute(), names

    def why_not(self, *arguments: Any) -> str | None:
        """The reason why these kernels cannot compute with the tensors among these, or None: what `Backend(supports=...)` asks."""
        if exporting():
            return f"an exported file must run without {self.file.name}"
        given = [argument for argument in arguments if isinstance(argument, Tensor)]
        if any(t.device.type != "cpu" for t in given):
            return f"{self.file.name} computes on the CPU"
        return self.lacks(given[0].dtype)

    def lacks(self, dtype: torch.dtype) -> str | None:
        library, says = self.loaded
        if library is None:
            return says
        if dtype not in NAMES:
            return f"{dtype} is not among {', '.join(map(str, NAMES))}"
        missing = [name for name in (f"{name}_{NAMES[dtype]}" for name in self.names) if not hasattr(library, name)]
        return f'{self.file.name} has no function {missing[0]} (is it extern "C"?)' if missing else None

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | int | None) -> None:
        """As `native.call`, of this library, with all the threads that torch has."""
        library, says = self.loaded
        if library is None:
            raise RuntimeError(says)
        _call(getattr(library, f"{name}_{NAMES[dtype]}"), name, dtype, arguments, allowed_threads())

    @cached_property
    def loaded(self) -> tuple[ctypes.CDLL | None, str]:
        """The library and its file, or None and the reason."""
        try:
            file = compile_once(self.file) if self.file.suffix in (".cpp", ".cc", ".cxx") else self.file
            return ctypes.CDLL(str(file)), str(file)
        except NoLibrary as error:
            return None, f"{self.file.name} is not compiled: {error}"
        except OSError as error:
            return None, f"{self.file.name} does not load: {error}"


# What torch.compiler.assume_constant_result does, which takes seconds to import: the compiler calls it instead of looking into it.
setattr(Library.lacks, "_dynamo_marked_constant", True)  # noqa: B010


def _forked() -> None:
    """OpenMP's threads do not survive a fork: more than one would wait for ever."""
    global _threads
    _threads = 1


os.register_at_fork(after_in_child=_forked)
