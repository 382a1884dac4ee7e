"""Loads compiled kernels, those of csrc/ and your own, and makes every call into them.

They are plain functions on pointers in a shared library. Those of csrc/cpu are built when lab is installed, one library for each
instruction set; the best one that this processor has is loaded. Those of csrc/cuda are a library of their own, for tensors on a GPU: the
same functions with the stream in place of the number of threads. `why_not()` says why there is none. `Library` is one of your own,
on the CPU. A call checks every tensor: a wrong pointer would end the process.
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

from lab.compiler import ARCHITECTURES, LAB_CUDA, NoLibrary, compile_once, cuda_sources, digest, levels_here, own_sources, rebuild_command
from lab.ops.backend import exporting

FOLDER = Path(__file__).parent
NAMES = {torch.float32: "float32", torch.float64: "float64", torch.complex64: "complex64", torch.complex128: "complex128"}

# Multiply-adds for each thread, about 100 microseconds. To wake a thread takes 5, or 10,000 where its core has other work: a decode step
# must not wait for that.
GRAIN = 1 << 20
_threads: int | None = None  # a limit on the kernels' threads: 1 in a forked process


def load(folder: Path = FOLDER, sources: Sequence[Path] | None = None) -> tuple[ctypes.CDLL | None, str]:
    """The library for the CPU and its instruction set, or None and the reason.

    In a checkout it must have been built from the sources that are there: Python code and kernels of two versions would not fit.
    """
    for level in levels_here():
        file = folder / f"cpu_{level}.so"
        if file.exists():
            return _open(file, own_sources() if sources is None else sources, "", level)
    return None, "the C++ kernels are not built: installing lab with a C++ compiler at hand builds them"


def load_cuda(folder: Path = FOLDER, sources: Sequence[Path] | None = None) -> tuple[ctypes.CDLL | None, str]:
    """The library for GPUs and what it was compiled for, or None and the reason."""
    file = folder / "cuda.so"
    if not file.exists():
        return None, f"the CUDA kernels are not built: installing lab with nvcc and a GPU at hand, or {LAB_CUDA}=1, builds them"
    library, says = _open(file, cuda_sources() if sources is None else sources, f"{LAB_CUDA}=1 ", "")
    return (None, says) if library is None else _for_the_driver(library)


def _for_the_driver(library: ctypes.CDLL) -> tuple[ctypes.CDLL | None, str]:
    made, driver = made_of(library), library.old_driver()
    if driver:
        return None, f"cuda.so was built by {made['compiler']}, the driver here goes up to CUDA {driver // 1000}.{driver % 1000 // 10}"
    return library, made["threads"]


def _open(file: Path, wanted: Sequence[Path], variables: str, says: str) -> tuple[ctypes.CDLL | None, str]:
    try:
        library = ctypes.CDLL(str(file))
        built = made_of(library)["sources"]
    except (OSError, AttributeError) as error:
        return None, f"{file.name} does not load ({error}); {variables}{rebuild_command()}"
    if wanted and built != digest(wanted):
        return None, f"{file.name} was built from other sources than csrc/ holds now; {variables}{rebuild_command()}"
    return library, says


def made_of(library: ctypes.CDLL) -> dict[str, str]:
    """What one of lab's own libraries was built from, by what, and whether it has threads, or for which GPUs it was compiled.
    AttributeError of any other library."""
    library.made_of.restype = ctypes.c_char_p
    return dict(zip(("sources", "compiler", "threads"), library.made_of().decode().split("|"), strict=True))


LIBRARY, SAYS = load()  # what was loaded, and its instruction set or the reason why there is none
CUDA, CUDA_SAYS = load_cuda()  # the same, for tensors on a GPU


def width(t: Tensor) -> int:
    """How many numbers of its dtype a vector of the library for its device holds; some buffers are laid out in whole vectors."""
    library = CUDA if t.is_cuda else LIBRARY
    assert library is not None
    library.width.restype = ctypes.c_int64
    return library.width(ctypes.c_int64(t.dtype.itemsize))


def why_not(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> str | None:
    """The reason why the kernels cannot compute with these tensors, or None."""
    given = [t for t in tensors if t is not None]
    device = given[0].device.type
    if device == "cuda" and CUDA is None:
        return CUDA_SAYS
    if device != "cuda" and LIBRARY is None:
        return SAYS
    if exporting():
        return "an exported file must run without lab's kernels"
    if device not in ("cpu", "cuda"):
        return f"a tensor is on {device}, there are kernels for the CPU and for CUDA"
    if any(t.device != given[0].device for t in given):
        return f"its tensors are on {given[0].device} and {next(t.device for t in given if t.device != given[0].device)}"
    if given[0].dtype not in dtypes:
        return f"{given[0].dtype} is not among {', '.join(map(str, dtypes))}"
    return _too_old(given[0].device.index) if device == "cuda" else None


def _too_old(index: int | None) -> str | None:
    """Why a GPU cannot run the kernels, or None."""
    if not torch.cuda.is_available():  # it is only asked about
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return f"cuda:{index} has sm_{major}{minor}, the CUDA kernels need {next(iter(ARCHITECTURES))}" if major < 8 else None


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | None, work: int) -> None:
    """name_dtype(pointers and integers ..., threads or stream), of the library for the first tensor's device. Tensors must be contiguous,
    on one device and of `dtype`; None is a null pointer. work: about how many multiply-adds the call takes, for `threads_for`."""
    device = next(t.device for t in arguments if isinstance(t, Tensor))
    run = function(f"{name}_{NAMES[dtype]}", device.type)
    if device.type == "cpu":
        _call(run, name, dtype, device, arguments, threads_for(work))
        return
    with torch.cuda.device(device):
        error = _call(run, name, dtype, device, arguments, torch.cuda.current_stream(device).cuda_stream)
    if error:
        raise RuntimeError(f"{name}: the CUDA kernel did not start on {device}: {error_text(error)}")


def error_text(error: int) -> str:
    """What CUDA says of the number of an error."""
    assert CUDA is not None
    CUDA.error_text.restype = ctypes.c_char_p
    return CUDA.error_text(ctypes.c_int64(error)).decode()


def threads_for(work: int) -> int:
    """The threads for so many multiply-adds: torch's number at most, and each of them has GRAIN to do. Results do not depend on it."""
    return max(1, min(allowed_threads(), work // GRAIN))


def allowed_threads() -> int:
    return _threads or torch.get_num_threads()


@cache
def function(name: str, device: str = "cpu") -> Any:
    library, says = (CUDA, CUDA_SAYS) if device == "cuda" else (LIBRARY, SAYS)
    if library is None:
        raise RuntimeError(says)
    loaded = getattr(library, name)
    loaded.restype = ctypes.c_int64  # of CUDA kernels, the number of an error; those of the CPU return nothing
    return loaded


def _call(run: Any, name: str, dtype: torch.dtype, device: torch.device, arguments: Sequence[Tensor | int | None], last: int) -> int:
    values: list[Any] = []
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            if argument.dtype != dtype or argument.device != device or not argument.is_contiguous() or argument.is_conj():
                where = "the CPU" if device.type == "cpu" else device
                raise ValueError(
                    f"{name}: argument {i} must be a contiguous {dtype} tensor on {where}, got {argument.dtype} on {argument.device} "
                    f"with strides {argument.stride()}"
                )
            values.append(ctypes.c_void_p(argument.data_ptr()))
        else:
            values.append(argument if argument is None else ctypes.c_int64(argument))
    return run(*values, ctypes.c_int64(last))  # `arguments` keeps the tensors alive until it returns


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
        _call(getattr(library, f"{name}_{NAMES[dtype]}"), name, dtype, torch.device("cpu"), arguments, allowed_threads())

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
for asked in (Library.lacks, _too_old):
    setattr(asked, "_dynamo_marked_constant", True)  # noqa: B010


def _forked() -> None:
    """OpenMP's threads do not survive a fork: more than one would wait for ever."""
    global _threads
    _threads = 1


os.register_at_fork(after_in_child=_forked)
