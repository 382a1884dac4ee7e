"""The native build: csrc/cpu as one plain shared library per instruction set, without torch's or Python's headers.

Everything else stands in pyproject.toml. Without a C++ compiler the install succeeds, and the ops run in PyTorch.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Icsrc/include"]
MACHINES = {  # instruction set -> what the compiler is told; the best one that the processor has is loaded
    "x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "x86_64_v3": ["-march=x86-64-v3"],
    "x86_64": ["-march=x86-64"],
}


def extensions() -> list[Extension]:
    machines = MACHINES if platform.machine() in ("x86_64", "AMD64") else {platform.machine(): []}
    openmp = ["-fopenmp"] if platform.system() == "Linux" else []  # elsewhere the kernels run on one thread
    sources = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    headers = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "csrc" / "include").glob("*.h"))
    return [
        Extension(f"lab.ops.cpu_{name}", sources, depends=headers, extra_compile_args=FLAGS + march + openmp, optional=True)
        for name, march in machines.items()
    ]


class PlainLibraries(build_ext):
    """One compiler call for each library. ctypes loads them, so their names carry no Python version and they export no module.

    An older library goes first: a build that fails must not leave it behind, to be loaded with today's Python code.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def run(self) -> None:
        if self.inplace or self.editable_mode:
            for extension in self.extensions:
                (ROOT / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        super().run()

    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        command = [os.environ.get("CXX") or "c++", *ext.extra_compile_args, *ext.sources, "-o", str(target)]
        try:
            subprocess.run(command, check=True, cwd=ROOT)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{ext.name} is not built: {error}") from error


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=extensions(), cmdclass={"build_ext": PlainLibraries, "bdist_wheel": AnyPython})
