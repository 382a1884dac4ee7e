"""The native build, on a library of one line: it follows every source, and leaves no old library behind where it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lab import compiler
from lab.ops import native

ROOT = Path(__file__).parents[1]
has_compiler = pytest.mark.skipif(compiler.compiler_version() is None, reason=f"there is no C++ compiler {compiler.compiler()!r} here")
SOURCE = """\
#include "value.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int value() { return VALUE; }
EXPORT const char* made_of() { return LAB_SOURCES "|compiler|threads"; }
"""


class Checkout:
    """setup.py as it is, over a csrc of one function."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.header = folder, folder / "csrc" / "include" / "value.h"
        for name in ("setup.py", "lab/__init__.py", "lab/compiler.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (folder / "lab" / "ops").mkdir()
        (folder / "pyproject.toml").write_text('[project]\nname = "lab"\nversion = "0"\n[tool.setuptools]\npackages = ["lab"]\n')
        for file, text in ((folder / "csrc" / "cpu" / "value.cpp", SOURCE), (self.header, "#define VALUE 1\n")):
            file.parent.mkdir(parents=True)
            file.write_text(text)

    def build(self, *words: str, cxx: str | None = None, **variables: str) -> str:
        environment = os.environ | {"CXX": cxx or compiler.compiler(), **variables}
        command = [sys.executable, "setup.py", *words]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def libraries(self, place: str) -> set[str]:
        return {file.name for file in (self.folder / place).rglob("*.so")}

    def load(self):
        """As lab would, in a folder of its own: a library is loaded once by its path."""
        copy = self.folder / f"copy{len(list(self.folder.iterdir()))}"
        shutil.copytree(self.folder / "lab" / "ops", copy)
        return native.load(copy, compiler.own_sources(self.folder))


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@has_compiler
def test_the_one_command_follows_every_source(checkout):
    checkout.build("build_ext", "--inplace")
    assert checkout.libraries("lab/ops") == {f"cpu_{level}.so" for level in compiler.LEVELS}
    library, says = checkout.load()
    assert library.value() == 1 and says == compiler.levels_here()[0]
    checkout.header.write_text("#define VALUE 2\n")
    library, says = checkout.load()
    assert library is None and says.startswith(f"cpu_{compiler.levels_here()[0]}.so was built from other sources than csrc/ holds now; ")
    checkout.build("build_ext", "--inplace")
    library, _ = checkout.load()
    assert library.value() == 2


@has_compiler
@pytest.mark.parametrize(("words", "place"), [(["build_ext", "--inplace"], "lab/ops"), (["build"], "build")], ids=["inplace", "wheel"])
def test_a_build_that_fails_leaves_no_old_library(checkout, words, place):
    checkout.build(*words)
    assert len(checkout.libraries(place)) == len(compiler.LEVELS)
    said = checkout.build(*words, cxx="/bin/false")
    assert not checkout.libraries(place) and "is not built, its ops will run in PyTorch: the C++ compiler '/bin/false' fails" in said
    checkout.build(*words)
    checkout.header.write_text("#define VALUE no_such\n")
    said = checkout.build(*words)
    assert not checkout.libraries(place) and "value.h:1:" in said and "no_such" in said, said


@pytest.mark.parametrize("works", [True, False])
def test_cuda_kernels_are_built_on_demand_and_a_build_that_fails_leaves_no_old_one(checkout, works):
    """With an nvcc that is a script: it writes its own command line."""
    (checkout.folder / "csrc" / "cuda").mkdir()
    (checkout.folder / "csrc" / "cuda" / "value.cu").write_text("")
    script = checkout.folder / "home" / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\n" + ('for last; do :; done; echo "$@" > "$last"' if works else "echo value.cu: error: no >&2; exit 1"))
    script.chmod(0o755)
    cuda = {"CUDA_HOME": str(checkout.folder / "home"), "cxx": "/bin/false"}
    old = checkout.folder / "lab" / "ops" / "cuda.so"
    old.write_text("old")
    checkout.build("build_ext", "--inplace", LAB_CUDA="0", **cuda)
    assert old.read_text() == "old", "left out, not removed"
    said = checkout.build("build_ext", "--inplace", LAB_CUDA="1", **cuda)
    if works:
        line = old.read_text()
        assert "code=sm_80" in line and "code=[sm_90,compute_90]" in line and "csrc/cuda/value.cu" in line
        assert compiler.digest(compiler.cuda_sources(checkout.folder)) in line
    else:
        assert not old.exists() and "lab.ops.cuda is not built, its ops will run in PyTorch: the CUDA compiler " in said
        assert "value.cu: error: no" in said


@has_compiler
def test_a_library_that_is_none_of_labs_is_not_used(checkout):
    for level in compiler.LEVELS:
        (checkout.folder / "lab" / "ops" / f"cpu_{level}.so").write_bytes(b"no library")
    library, says = checkout.load()
    assert library is None and " does not load (" in says and says.endswith(compiler.rebuild_command())


def test_what_builds_it_again_is_one_command(monkeypatch):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: sys.executable)
    monkeypatch.setattr(compiler, "installed_from", lambda: ROOT)  # editable
    assert compiler.rebuild_command() == f"python -m pip install --no-deps --editable {ROOT}"
    monkeypatch.setattr(compiler, "installed_from", lambda: Path("/home/me/my lab"))
    assert compiler.rebuild_command() == f"cd {ROOT} && python setup.py build_ext --inplace"
    monkeypatch.setattr(compiler, "own_sources", lambda: [])  # not editable: no sources beside the package
    assert compiler.rebuild_command() == "python -m pip install --force-reinstall --no-deps '/home/me/my lab'"
