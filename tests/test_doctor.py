"""lab-doctor: which backend runs where, and why not the fast one, on this machine and on others that are made up here."""

from __future__ import annotations

import json

import pytest
import torch

from lab import compiler, ops
from lab.analysis import doctor
from lab.cli.doctor import main
from lab.ops import backend, native, use

MAPS = """\
7f0 r-xp 00000000 00:1f 1 /venv/site-packages/torch/lib/libgomp.so.1
7f1 rw-p 00000000 00:1f 1 /venv/site-packages/torch/lib/libgomp.so.1
7f2 r-xp 00000000 00:1f 2 /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0
7f3 r-xp 00000000 00:1f 3 /usr/lib/x86_64-linux-gnu/libc.so.6
"""


@pytest.fixture
def unbuilt(monkeypatch):
    monkeypatch.setattr(native, "LIBRARY", None)
    monkeypatch.setattr(native, "SAYS", "the C++ kernels are not built: installing lab builds them")


def test_every_op_computes_what_its_formula_says():
    found = doctor.diagnose()
    assert set(found["ops"]) == set(ops.ops()) and found["devices"]["cpu"] is None
    for op, devices in found["ops"].items():
        entry = devices["cpu"]
        assert entry["difference"] is not None and entry["difference"] < 1e-5, op
        assert entry["runs"] and set(entry["backends"]) == {entry["runs"], *entry["why_not"]}
        assert entry["runs"] == ("native" if native.LIBRARY and "native" in entry["backends"] else "torch")
    json.dumps(found)


def test_a_device_that_is_not_here_can_be_asked_about(monkeypatch):
    """With tensors that hold nothing."""
    monkeypatch.setattr(native, "CUDA", None)
    monkeypatch.setattr(native, "CUDA_SAYS", "the CUDA kernels are not built")
    found = {op.name: doctor.look(op, "cuda", here=False) for op in ops.every()}
    for entry in found.values():
        assert entry["runs"] in entry["backends"]["native" in entry["backends"] :] and entry["difference"] is None
    assert found["causal_conv"]["why_not"]["native"] == "the CUDA kernels are not built"
    monkeypatch.setattr(native, "CUDA", object())
    found = {op.name: doctor.look(op, "cuda", here=False) for op in ops.every()}
    assert {name for name, entry in found.items() if entry["runs"] != "native"} == {"decode", "grouped_matmul"}
    assert found["causal_conv"]["why_not"]["reference"] == "native comes first"


def test_a_gpu_without_kernels_for_it_is_what_to_change():
    kernels = {"loaded": "x86_64", "processor": "x86_64", "built": ["x86_64"]}
    cuda = {
        "gpu": True,
        "loaded": None,
        "why_not": "the CUDA kernels are not built: installing lab builds them",
        "compiler_here": "/bin/nvcc",
    }
    command = f"LAB_CUDA=1 {compiler.rebuild_command()}"
    assert doctor.remedy({}, kernels | {"cuda": cuda}, {}) == ("the CUDA kernels are not built", command)
    cuda["compiler_here"] = None
    assert doctor.remedy({}, kernels | {"cuda": cuda}, {})[1].endswith(f"(nvcc) && {command}")


def test_without_kernels_it_says_why_and_what_builds_them(unbuilt, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    found = doctor.diagnose()
    entry = found["ops"]["selective_scan"]["cpu"]
    assert entry["runs"] == "torch" and entry["why_not"]["native"].startswith("the C++ kernels are not built")
    assert found["kernels"]["loaded"] is None
    what, command = doctor.remedy(found["ops"], found["kernels"] | {"compiler_here": "g++ 12"}, found["environment"])
    assert what == "the C++ kernels are not built" and command == compiler.rebuild_command()
    _, command = doctor.remedy(found["ops"], found["kernels"] | {"compiler_here": None}, found["environment"])
    assert "install" in command.partition("&&")[0] and command.endswith(compiler.rebuild_command())


def test_a_compiler_variable_that_names_none_is_what_to_change(unbuilt, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    assert compiler.compiler_version() is None
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert doctor.build_command(None).startswith("unset CXX; ")


def test_a_forced_backend_shows_and_is_what_to_change():
    with use(causal_conv="reference"):
        found = doctor.diagnose()
    assert found["forced"] == {"causal_conv": "reference"}
    assert found["ops"]["causal_conv"]["cpu"]["runs"] == "reference"
    assert found["ops"]["causal_conv"]["cpu"]["why_not"]["torch"] == "another one is forced"
    if native.LIBRARY:
        assert found["change"] == ("backends are chosen by hand", "leave out ops.causal_conv=reference")


def test_a_backend_that_computes_something_else_is_reported(monkeypatch):
    monkeypatch.setattr(backend, "_forced", {})
    wrong = backend.Backend("wrong", lambda *args: args[0] + 1)
    broken = backend.Backend("broken", lambda *args: args[0].no_such)
    nothing = backend.Backend("nothing", lambda *args: torch.full_like(args[0], torch.nan))
    for own in (wrong, nothing, broken):
        with use(fft_conv=own):
            entry = doctor.look(next(op for op in ops.every() if op.name == "fft_conv"), "cpu", here=True)
        assert not doctor._agrees(entry["difference"]) and entry["backends"][0] == own.name == entry["runs"]
        kernels = {"loaded": "x86_64", "processor": "x86_64", "built": ["x86_64"]}
        what, command = doctor.remedy({"fft_conv": {"cpu": entry}}, kernels, {})
        assert what.startswith("fft_conv: not what the formula gives") and command == "lab-train ... ops.fft_conv=torch"
    assert entry["difference"].startswith("AttributeError: ")


def test_a_lower_instruction_set_and_few_threads_are_matters_too():
    kernels = {"loaded": "x86_64", "processor": "x86_64_v3", "built": ["x86_64"]}
    assert doctor.remedy({}, kernels, {}) == ("this processor has x86_64_v3, the kernels for it are not built", compiler.rebuild_command())
    environment = {"threads": 1, "cores": 8, "variables": {"OMP_NUM_THREADS": "1"}}
    kernels["loaded"] = "x86_64_v3"
    assert doctor.remedy({}, kernels, environment)[1] == "unset OMP_NUM_THREADS"
    assert doctor.remedy({}, kernels, environment | {"threads": 8}) == (
        "every op runs the first of its backends that there is for this machine", None
    )  # fmt: skip


def test_openmp_libraries_are_counted_once_each():
    assert doctor.openmp(MAPS) == ["/usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0", "/venv/site-packages/torch/lib/libgomp.so.1"]
    assert doctor.openmp("") == []


def test_an_op_without_an_example_says_so(monkeypatch):
    monkeypatch.setattr(backend, "_ops", {})
    monkeypatch.setattr(backend, "_used", {})
    op = backend.Op("increment", (backend.Backend("reference", lambda x: x + 1),))
    assert doctor.look(op, "cpu", here=True)["why_not"] == {"reference": "the op gives no example"}
    with pytest.raises(ValueError, match="op increment: there is one already, of test_doctor; choose another name"):
        backend.Op("increment", (backend.Backend("reference", torch.add),))


def test_the_table_fits_and_names_the_one_command(command):
    done = command("lab-doctor", "ops.fft_conv=reference")
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.rstrip().splitlines()
    assert max(map(len, lines)) <= 80 and any("kuramoto_scan" in line and "torch" in line for line in lines)
    assert "torch on cpu: another one is forced (fft_conv)" in lines
    assert lines[-1] == "To change it:" and ("ops.fft_conv=reference" in last or not native.LIBRARY)
    assert done.stderr == "", "an op that is looked at warns of nothing"


def test_the_words_are_those_of_a_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend, "_ops", dict(backend._ops))
    monkeypatch.setattr(backend, "_used", dict(backend._used))
    (tmp_path / "of_mine.py").write_text(
        "from lab.ops import native\nfrom lab.ops.backend import Backend, Op\n"
        "FAST = Backend('fast', lambda u, K: u, supports=native.Library('nowhere.so', 'fft_conv').why_not)\n"
        "twice = Op('twice', (Backend('reference', lambda x: 2 * x),))\n"
    )
    words = ["ops.fft_conv=of_mine.FAST", "--import", "of_mine", "--format", "json"]
    with ops.use():
        assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["forced"] == {"fft_conv": "fast"} and "twice" in found["ops"]
    entry = found["ops"]["fft_conv"]["cpu"]
    assert entry["runs"] != "fast" and entry["why_not"]["fast"].startswith("nowhere.so does not load: ")
    for word, sentence in (
        ("ops.fftconv=torch", "ops.fftconv: there is no such op; did you mean ops.fft_conv?"),
        ("ops.fft_conv=torc", "ops.fft_conv: fft_conv has no backend torc; did you mean torch?"),
        (
            "ops.fft_conv=of_mine.twice",
            "ops.fft_conv: of_mine.twice must be a lab.ops.backend.Backend; it is of type Op",
        ),
        (
            "seed=1",
            "seed is nothing that lab-doctor asks about; it takes ops.OP=BACKEND, such as ops.selective_scan=torch; with --model NAME "
            "also model.KEY=VALUE",
        ),
    ):
        assert main([word]) == 2 and capsys.readouterr().err == f"lab-doctor: {sentence}\n"
