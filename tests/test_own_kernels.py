"""Kernels of the user's own: the example of csrc/README.md is built and tested, and what cannot be loaded falls back and says why."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lab import compiler, ops
from lab.config import ConfigError, check, compose
from lab.ops import causal_conv, native, use
from lab.ops.backend import Backend

ROOT = Path(__file__).parents[1]
has_compiler = pytest.mark.skipif(compiler.compiler_version() is None, reason=f"there is no C++ compiler {compiler.compiler()!r} here")
DOUBLE = """\
#include <cstdint>
extern "C" void twice_float32(const float* x, float* y, int64_t n, int64_t threads) { for (int64_t i = 0; i < n; i++) y[i] = 2 * x[i]; }
"""


def example(folder: Path) -> Path:
    for text in re.findall(r"^```(?:cpp|python)\n(.*?)^```", (ROOT / "csrc" / "README.md").read_text(), re.MULTILINE | re.DOTALL):
        (folder / re.match(r"(?:#|//) (\S+)\n", text)[1]).write_text(text)
    return folder


@has_compiler
def test_the_example_of_the_five_steps_is_built_and_passes_its_test(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", str(example(tmp_path))]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "9 passed" in done.stdout, done.stdout + done.stderr
    (library,) = (tmp_path / "__pycache__").glob("*.so")
    assert library.name.startswith(f"leaky.{compiler.levels_here()[0]}.")


@has_compiler
def test_a_source_is_compiled_once_and_again_when_it_or_its_header_changes(tmp_path):
    source = tmp_path / "twice.cpp"
    source.write_text('#include "factor.h"\n' + DOUBLE.replace("2 *", "FACTOR *"))
    header = tmp_path / "factor.h"
    header.write_text("#define FACTOR 2\n")
    first = compiler.compile_once(source)
    written = first.stat().st_mtime_ns
    assert compiler.compile_once(source) == first and first.stat().st_mtime_ns == written
    header.write_text("#define FACTOR 3\n")
    kernels, y = native.Library(source, "twice"), torch.zeros(3)
    kernels.call("twice", torch.float32, torch.ones(3), y, 3)
    assert y.tolist() == [3, 3, 3]
    assert [file.suffix for file in (tmp_path / "__pycache__").iterdir()] == [".so"] * 2, "nothing is left behind"


@has_compiler
def test_what_a_library_lacks_is_said(tmp_path):
    source = tmp_path / "twice.cpp"
    source.write_text(DOUBLE)
    kernels = native.Library(source, "twice")
    assert kernels.why_not(torch.ones(3), None) is None
    assert kernels.why_not(torch.ones(3, dtype=torch.float64)) == 'twice.cpp has no function twice_float64 (is it extern "C"?)'
    assert "torch.bfloat16 is not among" in kernels.why_not(torch.ones(3, dtype=torch.bfloat16))
    assert kernels.why_not(torch.ones(3, device="meta")) == "twice.cpp computes on the CPU"
    wrong = native.Library(source, "thrice").why_not(torch.ones(3))
    assert wrong == 'twice.cpp has no function thrice_float32 (is it extern "C"?)'
    with pytest.raises(ValueError, match="twice: argument 0 must be a contiguous torch.float32 tensor"):
        kernels.call("twice", torch.float32, torch.ones(6)[::2], torch.ones(3), 3)


def test_a_library_that_is_missing_or_for_another_machine_says_so(tmp_path):
    x = torch.ones(3)
    assert re.match(r"gone.so does not load: .*No such file", native.Library(tmp_path / "gone.so", "twice").why_not(x))
    assert native.Library(tmp_path / "gone.cpp").why_not(x) == f"gone.cpp is not compiled: there is no file {tmp_path}/gone.cpp"
    other = bytearray(Path(torch._C.__file__).read_bytes()[:4096])
    other[18:20] = (8).to_bytes(2, "little")  # the ELF header's machine: MIPS
    (tmp_path / "other.so").write_bytes(other)
    assert re.match(r"other.so does not load: ", native.Library(tmp_path / "other.so", "twice").why_not(x))
    with pytest.raises(RuntimeError, match="other.so does not load"):
        native.Library(tmp_path / "other.so", "twice").call("twice", torch.float32, x)


def test_without_a_compiler_the_next_backend_computes_and_says_why(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    (tmp_path / "twice.cpp").write_text(DOUBLE)
    mine = Backend("mine", torch.relu, supports=native.Library(tmp_path / "twice.cpp", "twice").why_not)
    args = torch.randn(2, 9, 3), torch.randn(2, 3)
    want = causal_conv(*args)[0]
    with use(causal_conv=mine), caplog.at_level(logging.WARNING, "lab.ops.backend"):
        assert torch.equal(causal_conv(*args)[0], want)
        causal_conv(*args)
    sentence = "twice.cpp is not compiled: there is no C++ compiler '/nowhere/c++' (No such file or directory); CXX names another one"
    assert caplog.messages[0] == f"op causal_conv does not use backend mine: {sentence}" and len(caplog.messages) <= 2
    monkeypatch.setenv("CXX", "/bin/false")
    reason = native.Library(tmp_path / "twice.cpp", "twice").why_not(torch.ones(1))
    assert reason == "twice.cpp is not compiled: the C++ compiler '/bin/false' fails (exit code 1): it says nothing"
    assert not list((tmp_path / "__pycache__").iterdir())


# A backend of one's own in place of a name


def reversing(*args):
    return args[0].flip(1)


MINE = Backend("reversing", reversing, supports=lambda x, *rest: None if x.shape[1] == 9 else "it takes 9 steps")


def test_a_backend_of_mine_is_asked_first_and_falls_back(caplog):
    x, w = torch.randn(2, 9, 3), torch.randn(2, 3)
    short = causal_conv(x[:, :5], w)[0]
    with use(causal_conv=MINE), caplog.at_level(logging.WARNING, "lab.ops.backend"):
        assert torch.equal(causal_conv(x, w)[0], x.flip(1)) and ops.used()["causal_conv"] == "reversing"
        assert torch.equal(causal_conv(x[:, :5], w)[0], short) and ops.used()["causal_conv"] != "reversing"
        compiled = torch.compile(lambda: causal_conv(x, w)[0], fullgraph=True, backend="eager")
        assert torch.equal(compiled(), x.flip(1))
    assert "op causal_conv does not use backend reversing: it takes 9 steps" in caplog.messages
    assert not torch.equal(causal_conv(x, w)[0], x.flip(1))
    with pytest.raises(ValueError, match="ops.causal_conv: it has a backend torch of its own; name yours otherwise"):
        ops.force({"causal_conv": Backend("torch", reversing)})


@pytest.fixture
def module_of_mine(tmp_path, monkeypatch):
    """A module in the current folder with an op, a backend, and something else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "kernels_of_mine.py").write_text(
        "from lab.ops.backend import Backend\nFAST = Backend('fast', lambda u, K: u.flip(1))\nOTHER = 3\n"
    )
    yield "kernels_of_mine"
    sys.modules.pop("kernels_of_mine", None)


def test_a_config_names_a_backend_by_its_module(module_of_mine):
    from lab.training.experiment import prepare

    words = ["experiment=copy_reverse_small", "model.d_model=16"]
    composed = compose([*words, "ops.fft_conv=kernels_of_mine.FAST"])
    check(composed)
    with ops.use():
        prepare(composed.config)
        assert ops.forced() == {"fft_conv": "fast"}
    for word, sentence in (
        ("kernels_of_mine.FAS", r"ops.fft_conv \(command line\): kernels_of_mine has no FAS"),
        (
            "kernels_of_mine.OTHER",
            "kernels_of_mine.OTHER must be a lab.ops.backend.Backend; it is of type int",
        ),
        ("kernels_of.FAST", r"ops.fft_conv \(command line\): there is no module kernels_of"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            check(compose([*words, f"ops.fft_conv={word}"]))


def test_a_config_that_was_loaded_imports_no_backend_without_a_word(module_of_mine):
    from lab.training.experiment import prepare

    composed = compose(["experiment=copy_reverse_small", "model.d_model=16", "ops.fft_conv=kernels_of_mine.FAST"])
    sentence = "a config that was loaded may not import kernels_of_mine.FAST; if you trust it, add --trust kernels_of_mine"
    with pytest.raises(ConfigError, match=sentence):
        check(composed, trust=[])
    with ops.use(), pytest.raises(ConfigError, match=sentence):
        prepare(composed.config, trust=["kernels"])
    assert module_of_mine not in sys.modules
    check(composed, trust=[module_of_mine])
