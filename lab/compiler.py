"""How kernels are compiled: those of lab, C++ and CUDA, by setup.py, at the installation, and a C++ source of your own at its first use.

Plain shared libraries without torch's or Python's headers, so that one compiler call is all there is to it. Needs the standard library
alone: setup.py imports it where nothing else is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

ROOT = Path(__file__).parents[1]  # of the checkout, if this is one
FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", "-Wno-psabi"]
OPENMP = ["-fopenmp"] if platform.system() == "Linux" else []  # elsewhere the kernels run on one thread

CUDA_FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
ARCHITECTURES = {  # of GPUs, and for those to come the intermediate code of the last one
    "sm_80": "arch=compute_80,code=sm_80",
    "sm_90": "arch=compute_90,code=[sm_90,compute_90]",
}
LAB_CUDA = "LAB_CUDA"  # the variable that asks for CUDA kernels (1) or leaves them out (0)


class Level(NamedTuple):
    flags: set[str]  # of /proc/cpuinfo, which a processor must have
    options: list[str]  # of the compiler


LEVELS = {  # instruction sets, the best one first
    "x86_64_v4": Level({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}, ["-march=x86-64-v4", "-mprefer-vector-width=512"]),
    "x86_64_v3": Level({"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}, ["-march=x86-64-v3"]),
    "x86_64": Level(set(), ["-march=x86-64"]),
}
if platform.machine() not in ("x86_64", "AMD64"):
    LEVELS = {platform.machine(): Level(set(), [])}


class NoLibrary(Exception):
    """A source did not become a library; the message says why."""


def compiler() -> str:
    return os.environ.get("CXX") or "c++"


def compiler_version() -> str | None:
    """The first line of what the compiler says of itself; None where there is none that runs."""
    try:
        done = subprocess.run([*compiler().split(), "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def levels_here() -> list[str]:
    """The instruction sets that this processor has, the best one first."""
    have = cpu_flags()
    return [name for name, level in LEVELS.items() if level.flags <= have]


def compile_library(sources: Iterable[str | Path], target: Path, level: str, options: Iterable[str] = (), cwd: Path | None = None) -> None:
    """One compiler call. What stood at `target` goes first, so that a call that fails leaves nothing old behind. Raises NoLibrary."""
    command = [*compiler().split(), *FLAGS, *LEVELS[level].options, *OPENMP, *options, *map(str, sources), "-o", str(target)]
    _run(command, target, cwd, f"C++ compiler {compiler()!r}", "CXX names another one")


def compile_cuda(sources: Iterable[str | Path], target: Path, options: Iterable[str] = (), cwd: Path | None = None) -> None:
    """The same by nvcc, for all ARCHITECTURES. Raises NoLibrary."""
    codes = [word for code in ARCHITECTURES.values() for word in ("-gencode", code)]
    options = [f'-DLAB_ARCHITECTURES="{", ".join(ARCHITECTURES)}"', *options]
    command = [nvcc() or "nvcc", *CUDA_FLAGS, "--threads", "0", *codes, *options, *map(str, sources), "-o", str(target)]
    _run(command, target, cwd, f"CUDA compiler {command[0]!r}", "CUDA_HOME names the folder of one")


def _run(command: list[str], target: Path, cwd: Path | None, what: str, hint: str) -> None:
    target.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, cwd=cwd, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise NoLibrary(f"there is no {what} ({error.strerror}); {hint}") from error
    print(done.stderr, end="", file=sys.stderr)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines()]
        first = next((line for line in said if "error" in line), said[0] if said else "it says nothing")
        raise NoLibrary(f"the {what} fails (exit code {done.returncode}): {first}")


def nvcc() -> str | None:
    """The CUDA compiler: that of the folder CUDA_HOME, or on the path; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def gpu_here() -> bool:
    """Whether this machine shows an NVIDIA GPU, or the driver of one."""
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def why_no_cuda() -> str | None:
    """Why an installation would leave out the CUDA kernels, or None. They take minutes, so without a GPU they are made on demand."""
    asked = os.environ.get(LAB_CUDA)
    if asked == "0":
        return f"{LAB_CUDA}=0 leaves them out"
    if nvcc() is None:
        return "there is no nvcc on the path or in CUDA_HOME"
    if not gpu_here() and asked != "1":
        return f"this machine shows no GPU; {LAB_CUDA}=1 asks for them all the same"
    return None


def digest(files: Iterable[Path]) -> str:
    """8 hex digits of what is in the files."""
    content = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        content.update(file.name.encode() + b"\0" + file.read_bytes())
    return content.hexdigest()[:8]


def own_sources(checkout: Path = ROOT) -> list[Path]:
    """The files that lab's own library is made of; [] where lab was installed from a wheel, which has none."""
    if not (checkout / "setup.py").exists():
        return []
    return [*sorted((checkout / "csrc" / "cpu").glob("*.cpp")), *sorted((checkout / "csrc" / "include").glob("*.h"))]


def cuda_sources(checkout: Path = ROOT) -> list[Path]:
    """The same, of the library for GPUs."""
    if not (checkout / "setup.py").exists():
        return []
    return [*sorted((checkout / "csrc" / "cuda").glob("*.cu")), *sorted((checkout / "csrc" / "cuda").glob("*.h"))]


def rebuild_command() -> str:
    """What builds lab's own library again, where lab was installed from."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    folder = installed_from()
    if own_sources() and folder != ROOT:  # a checkout that is only on the path
        return f"cd {shlex.quote(str(ROOT))} && {python} setup.py build_ext --inplace"
    how = "--no-deps --editable" if own_sources() else "--force-reinstall --no-deps"
    return f"{python} -m pip install {how} {shlex.quote(str(folder or 'CHECKOUT'))}"


def installed_from() -> Path | None:
    """The folder that pip installed lab from, if it is still there."""
    try:
        stored = json.loads(metadata.distribution("lab").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    folder = Path(url2pathname(urlparse(stored.get("url", "")).path))
    return folder if "dir_info" in stored and (folder / "setup.py").exists() else None


def compile_once(source: Path) -> Path:
    """The library of one C++ source for this processor, in __pycache__ beside it; made anew when it or a header beside it changes.

    In a checkout of lab it may include csrc/include/simd.h. Raises NoLibrary.
    """
    if not source.is_file():
        raise NoLibrary(f"there is no file {source}")
    level = levels_here()[0]
    headers = [*source.parent.glob("*.h"), *source.parent.glob("*.hpp"), *(file for file in own_sources() if file.suffix == ".h")]
    target = source.parent / "__pycache__" / f"{source.stem}.{level}.{digest([source, *headers])}.so"
    if target.exists():
        return target
    temporary = target.with_suffix(f".{os.getpid()}.tmp")  # several processes may want it at once
    try:
        compile_library([source], temporary, level, [f"-I{source.parent}", f"-I{ROOT / 'csrc' / 'include'}"])
        os.replace(temporary, target)
    except OSError as error:
        raise NoLibrary(f"{target} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target
