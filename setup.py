"""The native build: csrc/cpu as one plain shared library per instruction set, csrc/cuda as one for GPUs, each by one compiler call of
lab/compiler.py.

Everything else stands in pyproject.toml. Without a C++ compiler the install succeeds, and the ops run in PyTorch. The CUDA kernels are
built where nvcc and a GPU are; LAB_CUDA=1 asks for them without a GPU, LAB_CUDA=0 leaves them out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # pip builds without the current folder on the path
from lab.compiler import LEVELS, NoLibrary, compile_cuda, compile_library, cuda_sources, digest, own_sources, why_no_cuda  # noqa: E402


def extensions() -> list[Extension]:
    def library(name: str, sources: list[Path]) -> Extension:
        files = [str(file.relative_to(ROOT)) for file in sources]
        return Extension(name, [file for file in files if not file.endswith(".h")], depends=files, optional=True)

    found = [library(f"lab.ops.cpu_{level}", own_sources(ROOT)) for level in LEVELS]
    return [*found, library("lab.ops.cuda", cuda_sources(ROOT))] if cuda_sources(ROOT) and why_no_cuda() is None else found


class PlainLibraries(build_ext):
    """One compiler call for each library. ctypes loads them, so their names carry no Python version and they export no module.

    Every build compiles all of it, and an older library goes first: one that a build leaves behind, because it fails or takes the
    library for up to date, would be loaded with today's Python code.
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
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        cuda = ext.name == "lab.ops.cuda"
        of = f'-DLAB_SOURCES="{digest((cuda_sources if cuda else own_sources)(ROOT))}"'
        try:
            if cuda:
                compile_cuda(ext.sources, target, [of], cwd=ROOT)
            else:
                options = ["-Icsrc/include", "-fvisibility=hidden", of]
                compile_library(ext.sources, target, ext.name.partition("cpu_")[2], options, cwd=ROOT)
        except NoLibrary as error:
            raise CompileError(f"{ext.name} is not built, its ops will run in PyTorch: {error}") from error


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=extensions(), cmdclass={"build_ext": PlainLibraries, "bdist_wheel": AnyPython})
