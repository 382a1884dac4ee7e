"""What will run on this machine, and why not the fast one: what lab-doctor prints.

found = diagnose()       # ops, devices, kernels, environment, and the one command that would change it; all of it JSON
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import lab.models  # noqa: F401  (it has an op of its own, decode)
from lab import compiler, memory, ops
from lab.ops import native
from lab.ops.backend import Backend, Op, use

TOLERANCE = 1e-4  # of the largest value; float32 against the plain formula
OF_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_CPU_AFFINITY")
VARIABLES = ("CXX", "CUDA_HOME", compiler.LAB_CUDA, *OF_THREADS, "LD_PRELOAD", *memory.VARIABLES)
"""Environment variables that change what runs here, or how fast."""


def diagnose() -> dict[str, Any]:
    devices = {"cpu": None, "cuda": why_no_cuda()}
    by_op = {op.name: {device: look(op, device, absent is None) for device, absent in devices.items()} for op in ops.every()}
    kernels, environment = _kernels(), _environment()
    return {
        "ops": by_op,
        "devices": devices,
        "kernels": kernels,
        "environment": environment,
        "forced": ops.forced(),
        "change": remedy(by_op, kernels, environment),
    }


def look(op: Op, device: str, here: bool) -> dict[str, Any]:
    """{backends, forms, runs, why_not: {backend: reason}, difference}: the backend that would compute small tensors on `device`.

    here: whether the device is there. Then the backend computes them, and `difference` is that to the plain formula, relative to the
    largest value, or the sentence of an error.
    """
    own = [backend.name for backend in op.candidates() if backend not in op.backends]
    names = [*own, *(backend.name for backend in op.backends)]
    if op.example is None:
        return {
            "backends": names,
            "forms": [],
            "runs": None,
            "why_not": dict.fromkeys(names, "the op gives no example"),
            "difference": None,
        }
    with FakeTensorMode(), torch.device(device):  # a device that is not there can be asked about as well
        arguments = op.example()
        reasons = {backend.name: backend.supports(*arguments) for backend in op.candidates()}
    chosen = next((backend for backend in op.candidates() if reasons[backend.name] is None), None)
    runs = chosen.name if chosen else None
    why_not = {name: reasons.get(name, "another one is forced") or f"{runs} comes first" for name in names if name != runs}
    difference = _difference(op, chosen, device) if here and chosen else None
    return {"backends": names, "forms": list(op.forms), "runs": runs, "why_not": why_not, "difference": difference}


def _difference(op: Op, chosen: Backend, device: str) -> float | str:
    """Of a backend to the op's last one, the formula."""
    assert op.example is not None
    torch.manual_seed(0)
    try:
        with torch.device(device), torch.no_grad(), use("reference"):  # of ops that this one calls: they are looked at by themselves
            example, differences = op.example(), []
            for arguments in [(*example[:-1], form) for form in op.forms] or [example]:
                pairs = zip(*(pytree.tree_leaves(op.result(run(*arguments))) for run in (chosen.run, op.backends[-1].run)), strict=True)
                differences += [(got - want).abs().max() / (want.abs().max() + 1e-30) for got, want in pairs]
            return float(torch.stack(differences).max())  # NaN if one is
    except Exception as error:  # whatever it is, it is what the reader wants to know
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def why_no_cuda() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        driver = ", though this machine has an NVIDIA driver" if Path("/proc/driver/nvidia/version").exists() else ""
        return f"torch {torch.__version__} is built without CUDA{driver}"
    return f"torch {torch.__version__} finds no GPU"


def _kernels() -> dict[str, Any]:
    """The libraries of csrc/."""
    here = compiler.levels_here()
    found = {"loaded": None, "why_not": native.SAYS} if native.LIBRARY is None else {"loaded": native.SAYS, "why_not": None}
    built = [level for level in compiler.LEVELS if (native.FOLDER / f"cpu_{level}.so").exists()]
    made = native.made_of(native.LIBRARY) if native.LIBRARY is not None else {}
    return {**found, "processor": here[0], "built": built, **made, "compiler_here": compiler.compiler_version(), "cuda": _cuda_kernels()}


def _cuda_kernels() -> dict[str, Any]:
    """The library for GPUs, and what would build it."""
    here = {"gpu": torch.cuda.is_available(), "compiler_here": compiler.nvcc()}
    if native.CUDA is not None:
        return {"loaded": native.CUDA_SAYS, "why_not": None, "compiler": native.made_of(native.CUDA)["compiler"], **here}
    left_out = compiler.why_no_cuda() if not (native.FOLDER / "cuda.so").exists() else None
    why_not = f"the CUDA kernels are not built: {left_out}" if left_out else native.CUDA_SAYS
    return {"loaded": None, "why_not": why_not, "compiler": None, **here}


def _environment() -> dict[str, Any]:
    triton = util.find_spec("triton")
    return {
        "lab": metadata.version("lab") if _has("lab") else "not installed",
        "code": str(Path(native.__file__).parents[2]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "triton": metadata.version("triton") if triton else None,
        "platform": platform.platform(),
        "openmp": openmp(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "allocator": memory.allocator(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _has(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def openmp(maps: str | None = None) -> list[str]:
    """The OpenMP libraries of this process. One: torch and the kernels share its threads; two: each has its own."""
    if maps is None:
        file = Path("/proc/self/maps")
        maps = file.read_text() if file.exists() else ""
    return sorted(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)\b\S*", maps)))


def remedy(by_op: Mapping[str, Any], kernels: Mapping[str, Any], environment: Mapping[str, Any]) -> tuple[str, str | None]:
    """(what is the matter, the one command that would change it), the most important matter first; (all is well, None)."""
    forced, cuda = ops.forced(), kernels.get("cuda", {"gpu": False})
    if kernels["loaded"] is None:
        return re.split("[:;]", kernels["why_not"])[0], build_command(kernels["compiler_here"])
    if cuda["gpu"] and cuda["loaded"] is None:
        first = "" if cuda["compiler_here"] else "install NVIDIA's CUDA toolkit (nvcc) && "
        return re.split("[:;]", cuda["why_not"])[0], f"{first}{compiler.LAB_CUDA}=1 {compiler.rebuild_command()}"
    if forced:
        return "backends are chosen by hand", "leave out " + " ".join(f"ops.{op}={backend}" for op, backend in forced.items())
    wrong = [op for op, devices in by_op.items() for found in devices.values() if not _agrees(found["difference"])]
    if wrong:
        return f"{', '.join(dict.fromkeys(wrong))}: not what the formula gives; please report it", " ".join(
            ["lab-train ...", *(f"ops.{op}=torch" for op in dict.fromkeys(wrong))]
        )
    if kernels["built"] and kernels["loaded"] != kernels["processor"]:
        return f"this processor has {kernels['processor']}, the kernels for it are not built", compiler.rebuild_command()
    if environment["threads"] < environment["cores"] and "OMP_NUM_THREADS" in environment["variables"]:
        count = environment["variables"]["OMP_NUM_THREADS"]
        return f"OMP_NUM_THREADS={count}: torch and the kernels use {environment['threads']} of {environment['cores']} cores", (
            "unset OMP_NUM_THREADS"
        )
    return "every op runs the first of its backends that there is for this machine", None


def _agrees(difference: float | str | None) -> bool:
    return difference is None or (not isinstance(difference, str) and difference <= TOLERANCE)


def build_command(version: str | None) -> str:
    """What builds the kernels; first of all a compiler, where there is none (`version` None)."""
    if version is not None:
        return compiler.rebuild_command()
    rebuild = compiler.rebuild_command()
    if "CXX" in os.environ and shutil.which("c++"):  # it names one that does not run
        return f"unset CXX; {rebuild}"
    installers = {"apt-get": "apt-get install g++", "dnf": "dnf install gcc-c++", "xcode-select": "xcode-select --install"}
    first = next((command for tool, command in installers.items() if shutil.which(tool)), "install g++ or clang++")
    return f"{first} && {rebuild}" if sys.platform != "win32" else f"{first}; {rebuild}"
