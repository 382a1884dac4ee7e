"""Exported files against the model, with every model of configs/model; what is refused, what is left behind, what the manifest says."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from test_models import MODELS, V, from_yaml, lattice
from torch import nn

import lab
from lab import ops
from lab.analysis.conformance import randomise
from lab.cli.export import main
from lab.config import ConfigError, compose
from lab.export import FORMATS, export_model, export_run, formats, isolated, verify
from lab.export import export as export_module
from lab.export.graphs import graphs
from lab.mixers import Attention, Mixer, Output
from lab.models import Stack, initialise
from lab.ops import backend
from lab.tasks import ByteCorpus, CopyReverse
from lab.training import RunError, train

ROOT = Path(__file__).parents[1]
GRAPHS = ["sequence", "prefill", "step"]


def export(model, format: str, folder: Path, longest: int = 24) -> dict:
    """The manifest of a model with random weights."""
    initialise(model, 0)
    randomise(model, 0)
    return export_model(model, format, folder / f"model{FORMATS[format].suffix}", V, longest)[0]


def check(manifest: dict) -> None:
    """Every graph was compared, at a batch of 1 and others, at a length of 1, odd ones and one longer than the example."""
    assert [graph["name"] for graph in manifest["graphs"]] == GRAPHS
    cases = manifest["verification"]["cases"]
    assert all(case["largest_difference"] < 1e-4 for case in cases)
    for graph in GRAPHS:
        sizes = [(case["batch"], case["length"]) for case in cases if case["graph"] == graph]
        assert {1, 3} <= {B for B, _ in sizes} and max(L for _, L in sizes) > 7 and any(L % 2 for _, L in sizes)
        assert graph == "step" or (1, 1) in sizes


# Parity. TorchScript is quick; the other formats take 10 to 20 seconds, so that only one model of each is in the fast suite.


def in_every_format(names):
    fast = {("torchscript", name) for name in names}
    every = [(format, name) for format in FORMATS for name in names]
    return pytest.mark.parametrize(("format", "name"), [pytest.param(*c, marks=() if c in fast else pytest.mark.slow) for c in every])


@pytest.fixture
def at_once(monkeypatch):
    """The files are verified in this process: importing torch in a fresh one takes longer than all the rest."""

    def run(manifest, tokens):
        document = json.loads(manifest.read_text())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = isolated.load(document, manifest.parent)
        return {case: isolated.answer(document, loaded, case, inputs.numpy()) for case, inputs in tokens.items()}

    monkeypatch.setattr(verify, "run_isolated", run)


@pytest.fixture
def isolated_unless_quick(format, request):
    """A new process for each format but the quick one, whose isolation has tests of its own."""
    if format == "torchscript":
        request.getfixturevalue("at_once")


@pytest.mark.usefixtures("isolated_unless_quick")
@in_every_format(MODELS)
def test_yaml_exports(format, name, tmp_path):
    check(export(from_yaml(name), format, tmp_path, 32))


LATTICES = {
    "no_drive": {"drive": False},
    "gain": {"phase_mode": "gain"},
    "literal": {"phase_mode": "literal", "boundary": "periodic"},
    "no_limit": {"position": "none", "dt": 0.5},
}


@pytest.mark.usefixtures("isolated_unless_quick")
@in_every_format(list(LATTICES))
def test_lattice_exports(format, name, tmp_path):
    manifest = export(lattice(**LATTICES[name]), format, tmp_path)
    check(manifest)
    assert manifest["limits"] == (
        {"max_len": None, "max_len_enforced": None} if name == "no_limit" else {"max_len": 24, "max_len_enforced": True}
    )


def test_pt2_exports_in_the_fast_suite_too(tmp_path):
    check(export(Stack(V, 16, 1, partial(lab.mixers.Lattice, n_heads=2), max_len=24), "pt2", tmp_path))
    program = torch.export.load(tmp_path / "model.pt2").module()
    with pytest.raises(AssertionError, match="Guard failed"):
        program(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.parametrize("phase_mode", ["gain", "literal"])  # wave: the run below
def test_phase_modes_export_to_onnx_in_the_fast_suite_too(phase_mode, tmp_path):
    mixer = partial(lab.mixers.Lattice, n_heads=2, phase_mode=phase_mode, n_steps=2)
    check(export(Stack(V, 8, 1, mixer, max_len=12), "onnx", tmp_path, 12))


# A run, exported once to ONNX by the command.


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a trained run with its ONNX export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("exported"))
        train(compose([*TINY, "model=lot", "trainer.max_steps=4", "seed=3", "run_dir=run"]))
        assert main(["run", "--format", "onnx"]) == 0
        return Path("run").resolve()


@pytest.fixture
def run(exported, monkeypatch):
    monkeypatch.chdir(exported.parent)
    return exported


def test_the_manifest_says_what_was_written(run):
    folder = run / "exports"
    manifest = json.loads((folder / "best.onnx.json").read_text())
    assert sorted(file.name for file in folder.iterdir()) == ["best.onnx", "best.onnx.json", "best.prefill.onnx", "best.step.onnx"]
    check(manifest)
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert manifest["config"] == checkpoint["lab"]["config"] and manifest["config_hash"] == checkpoint["lab"]["config_hash"]
    assert (manifest["step"], manifest["checkpoint"], manifest["model"]) == (checkpoint["global_step"], "best", "lot")
    assert manifest["vocabulary"] == {"size": 12, "task": "copy_reverse", "encoding": None} and manifest["limits"] == {
        "max_len": 8,
        "max_len_enforced": True,
    }
    assert set(manifest["versions"]) == {"lab", "torch", "onnx", "onnxscript", "onnxruntime"} and manifest["opset"] >= 18
    assert manifest["verification"]["tolerance"] == {"absolute": 1e-4, "relative": 1e-4}
    model, _, _ = lab.load(run)
    theta0 = model.blocks[0].mixer.theta0
    layout = {spec["name"]: spec for spec in manifest["state"]}
    assert list(layout) == ["position", *(f"layers.0.{name}" for name in ("k", "v", "length", "theta"))]
    assert layout["layers.0.k"] == {"name": "layers.0.k", "shape": ["batch", "cache", 2, 10], "dtype": "float32", "initial": 0}
    assert layout["layers.0.theta"] == {"name": "layers.0.theta", "shape": ["batch", 2], "dtype": "float32", "initial": theta0.tolist()}
    import onnxruntime

    for graph in manifest["graphs"]:
        file = folder / graph["file"]
        assert (graph["bytes"], graph["sha256"]) == (file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
        session = onnxruntime.InferenceSession(file)
        for stated, found in ((graph["inputs"], session.get_inputs()), (graph["outputs"], session.get_outputs())):
            assert [(spec["name"], spec["shape"]) for spec in stated] == [(node.name, node.shape) for node in found]


def programs(document):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def test_the_documented_program_streams_what_the_model_generates(run, monkeypatch, capsys):
    (program,) = (text for text in programs("README.md") if "import onnxruntime" in text)
    (start,) = (text for text in programs("docs/export.md") if "def initial_state" in text)
    monkeypatch.chdir(run.parent)
    names: dict = {}
    exec(compile(program.replace("exported/model", "run/exports/best"), "README.md", "exec"), names)
    exec(
        compile(re.sub(r'Path\(".*"\)', 'Path("run/exports/best.onnx.json")', start.partition("\nprint(")[0]), "docs/export.md", "exec"),
        names,
    )
    model, _, _ = lab.load(run)
    for got, expected in zip(names["initial_state"](3), torch.utils._pytree.tree_leaves(model.init_state(3)), strict=True):
        assert got.dtype == expected.numpy().dtype and np.array_equal(got, expected.numpy())
    want = model.generate(torch.tensor([[3, 1, 4]]), max_new_tokens=5)[0, 3:].tolist()
    assert capsys.readouterr().out.split() == [str(token) for token in want]


def test_the_command_says_what_it_wrote(run, tmp_path, capsys):
    assert main(["run", "checkpoint=last", "--output", str(tmp_path / "new" / "m.pt"), "--format", "torchscript"]) == 0
    said = capsys.readouterr().out.splitlines()
    names = ["m.pt", "m.prefill.pt", "m.step.pt", "m.pt.json"]
    assert [Path(line.partition(":")[0]).name for line in said] == names and "largest difference" in said[0]
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == sorted(names)
    assert json.loads((tmp_path / "new" / "m.pt.json").read_text())["checkpoint"] == "last"


def test_an_op_that_a_run_forced_is_not_exported(run, at_once, monkeypatch, tmp_path):
    """The reference implementation is a loop over time; and what the caller has forced is not touched."""
    words = [*TINY, "model=lot", "ops.kuramoto_scan=reference", "trainer.max_steps=1", "trainer.val_every=1", f"run_dir={tmp_path}/forced"]
    with ops.use():
        train(compose(words))
    before = torch.get_rng_state(), dict(backend._forced)
    manifest, _ = export_run(str(tmp_path / "forced"), "torchscript")
    check(manifest)
    assert torch.equal(torch.get_rng_state(), before[0]) and backend._forced == before[1] == {}


def test_a_task_of_text_says_how_its_tokens_stand_for_it(run, monkeypatch):
    monkeypatch.setattr(CopyReverse, "encoding", ByteCorpus.encoding)
    monkeypatch.setattr(export_module, "export_model", lambda *a: a)
    assert export_run("run", "torchscript")[-1]["vocabulary"] == {"size": 12, "task": "copy_reverse", "encoding": "bytes of UTF-8"}


def test_the_format_by_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    names = {None: "onnx", "here": "onnx", "new/": "onnx", "m.onnx": "onnx", "m.pt2": "pt2", "m.ts.pt": "torchscript"}
    assert {name: export_module.choose_format(None, name) for name in names} == names
    assert export_module.choose_format("pt2", "anything") == "pt2"


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["run", "--output", "m.pt"], 2, "--output m.pt: no format by this name: it should end in one of .onnx, .ts.pt, .pt2, or in / for"),
        (["run", "--output", "exported"], 2, "--output exported: no format by this name"),
        (["run", "--format", "tflite"], 2, "--format tflite: expected one of onnx, torchscript, pt2"),
        (["run", "--format", "pt2", "--output", "a.onnx"], 2, "a.onnx is the name of a file of format onnx, but --format is pt2"),
        (["run", "--onnx", "a.onnx", "--format", "pt2"], 2, "--onnx FILE is short for --format onnx --output FILE"),
        (["run", "model.d_model=4"], 2, "model.d_model cannot change in lab-export"),
        (["run", "checkpoint=first"], 2, "checkpoint must be one of best, last, got 'first'"),
        (["checkpoint=last"], 2, "the run or checkpoint comes first"),
        (["run", "--config", "other.yaml"], 2, "--config other.yaml contradicts the run"),
        (["runn"], 1, "runn: there is no such run folder"),
        (["run", "--fromat", "onnx"], 2, "did you mean --format?"),
    ],
)
def test_mistakes_are_one_sentence(run, words, code, sentence, capsys):
    Path("other.yaml").write_text("# @package _global_\nmodel: {d_model: 32}\n")
    try:
        got = main(words)
    except SystemExit as error:
        got = error.code
    said = capsys.readouterr().err
    assert got == code and sentence in said and said.count("\n") == 1


def test_help_imports_nothing_heavy():
    code = """
import sys
from lab.cli.export import main
try:
    main(["--help"])
finally:
    assert not {"torch", "onnx", "hydra"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "examples:" in done.stdout


def test_missing_packages_are_named(run, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name.startswith("onnxs") else True)
    with pytest.raises(ConfigError, match=r"--format onnx needs onnxscript, not installed here: pip install onnx onnxscript onnxruntime"):
        export_run("run")


# What is broken is found, and nothing is left of it.


class Faulty(Attention):
    """Attention with one fault that only another batch or length shows."""

    def __init__(self, d_model: int, fault: str) -> None:
        super().__init__(d_model, n_heads=2)
        self.fault = fault

    def mix(self, x, state, lengths, want):
        out = super().mix(x, state, lengths, want)
        match self.fault:
            case "length":
                return out._replace(y=out.y * (int(x.shape[1]) + 1))
            case "batch":
                return out._replace(y=out.y * int(x.shape[0]))
            case "loop":
                return out._replace(y=torch.stack([out.y[:, t] for t in range(int(x.shape[1]))], 1))
            case "step" if state is not None:
                return out._replace(y=out.y * (int(state["k"].shape[1]) + 1))
        return out


@pytest.mark.parametrize(
    ("format", "fault", "sentence"),
    [
        ("torchscript", "length", r"the sequence graph at batch \d, length \d+ differs from the model by [\d.e+]+; allowed are 0.0001"),
        ("torchscript", "batch", r"the sequence graph at batch \d, length \d+ differs from the model by"),
        ("torchscript", "loop", r"the sequence graph at batch 1, length 1 fails: "),
        ("torchscript", "step", r"the step graph, after \d tokens, at batch \d, length \d+ differs from the model by"),
        ("pt2", "loop", r"the sequence graph cannot be recorded: Constraints violated \(length\)! You marked length as dynamic"),
    ],
)
def test_a_broken_export_fails_with_the_figure_and_leaves_nothing(format, fault, sentence, tmp_path, at_once):
    model = Stack(V, 16, 1, partial(Faulty, fault=fault), max_len=24)
    with pytest.raises(RunError, match=sentence) as error:
        export(model, format, tmp_path / "new")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_failed_export_keeps_what_was_there(run, tmp_path, monkeypatch, capsys, at_once):
    (tmp_path / "m.ts.pt").write_text("the old one")
    monkeypatch.setattr(verify, "ATOL", -1.0)
    assert main(["run", "--output", str(tmp_path / "m.ts.pt")]) == 1
    assert "differs from the model by" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["m.ts.pt"] and (tmp_path / "m.ts.pt").read_text() == "the old one"


@pytest.mark.parametrize(("got", "fine"), [(1.0001, True), (1.0003, False), (float("nan"), False), (float("inf"), False)])
def test_the_tolerance(got, fine):
    tokens, want = torch.zeros(1, 2, dtype=torch.long), np.ones((1, 2, V), np.float32)
    logits = np.where(np.arange(V) == 3, np.float32(got), want)
    if fine:
        assert verify.compare("stream.1.", tokens, logits, want)["largest_difference"] == pytest.approx(1e-4, rel=1e-2)
    else:
        with pytest.raises(RunError, match=r"the step graph, after 1 tokens, at batch 1, length 2 differs"):
            verify.compare("stream.1.", tokens, logits, want)


@pytest.mark.parametrize("longest", range(2, 12))
@pytest.mark.parametrize("from_nothing", [True, False])
def test_every_length_has_cases(longest, from_nothing):
    found = list(verify.cases(GRAPHS, longest, from_nothing))
    assert all(0 <= k < L <= longest and (k or from_nothing or name != "stream") for name, k, _, L in found)
    streams = [(k, B, L) for name, k, B, L in found if name == "stream"]
    assert max(B for _, B, _ in streams) > 1 and max(L for *_, L in streams) == longest
    assert min(k for k, *_ in streams) == (0 if from_nothing else 1)


def test_files_that_give_no_answer_are_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "TIMEOUT", 0)
    with pytest.raises(RunError, match="the files gave no logits within 0 seconds; nothing was written"):
        export(lattice(), "torchscript", tmp_path)
    assert not list(tmp_path.iterdir())


def test_packages_are_found_where_this_process_finds_them(tmp_path, monkeypatch):
    """`pip install --user` and PYTHONPATH: an isolated process does not look there by itself, as one with -S not into site-packages."""
    real = subprocess.run
    monkeypatch.setattr(verify.subprocess, "run", lambda words, **more: real([words[0], "-S", *words[1:]], **more))
    (tmp_path / "m.json").write_text('{"format": "onnx", "graphs": [], "state": []}')
    assert verify.run_isolated(tmp_path / "m.json", {}) == {}


def test_a_file_that_needs_lab_is_refused(tmp_path, monkeypatch):
    """An operator of ours left in the graph: in this process the file works, but nowhere else."""
    from importlib import import_module

    scan = import_module("lab.ops.kuramoto_scan")
    monkeypatch.setattr(scan, "exported", lambda *args: scan.forward_op(*args, "torch"))
    with pytest.raises(RunError, match="cannot be used in a process without lab: RuntimeError: Unknown builtin op: lab::kuramoto_scan"):
        export(lattice(), "torchscript", tmp_path)
    assert not list(tmp_path.iterdir())


def test_lab_cannot_be_imported_where_files_are_verified():
    code = (
        f"import runpy, sys; sys.meta_path.insert(0, runpy.run_path({isolated.__file__!r})['Blocker']()); sys.path.insert(0, {str(ROOT)!r})"
    )
    for name, fine in (("lab", False), ("lab.ops", False), ("labels", None), ("json", True)):
        done = subprocess.run([sys.executable, "-I", "-c", f"{code}; import {name}"], capture_output=True, text=True)
        assert (done.returncode == 0) == bool(fine) and ("lab is not there" in done.stderr) == (fine is False)


# Any state is served: its layout is seen in the tensors that the model returns.


class Turning(Mixer):
    """h_t = h_{t-1} + x_t e^{i phase}: a single complex tensor is the state."""

    def __init__(self, d_model: int, state: str = "complex") -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.linspace(0, 3, d_model))
        self.kind = state

    def mix(self, x, state, lengths, want):
        h = (x * torch.polar(torch.ones_like(self.phase), self.phase)).cumsum(1)
        if state is not None:
            h = h + state[:, None]
        return Output(torch.tanh(h.real - h.imag), state=h[:, -1])

    def init_state(self, batch_size, device=None, dtype=None):
        match self.kind:
            case "none":
                return None
            case "one way":
                raise NotImplementedError("no recurrent form")
        return torch.full((batch_size, len(self.phase)), -torch.inf if self.kind == "infinite" else 0, dtype=torch.complex64)


def turning(state: str) -> Stack:
    return Stack(V, 16, 1, partial(Turning, state=state), position="none")


def test_a_complex_state_is_real_outside(tmp_path, at_once):
    manifest = export(turning("complex"), "torchscript", tmp_path)
    check(manifest)
    assert manifest["state"][1] == {"name": "layers.0", "shape": ["batch", 16, 2], "dtype": "float32", "initial": 0}


def test_initial_values():
    assert graphs(turning("complex")).initial == (0, 0.0)
    assert graphs(turning("none")).initial is None  # a stream begins with a prefill
    start = graphs(turning("infinite")).initial[1]
    assert np.array_equal(np.asarray(start, "float32"), np.tile(np.float32([-np.inf, 0]), (16, 1))) and json.dumps(start, allow_nan=False)


def test_a_model_without_steps_has_the_sequence_graph_alone(tmp_path, at_once):
    manifest = export(turning("one way"), "torchscript", tmp_path)
    assert [graph["name"] for graph in manifest["graphs"]] == ["sequence"] and manifest["state"] == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.ts.pt", "model.ts.pt.json"]


def test_lengths_that_cannot_be_free(tmp_path):
    with pytest.raises(RunError, match="built with max_len=3; a graph of free length needs 4 or more"):
        graphs(Stack(V, 16, 1, partial(Attention, n_heads=2), max_len=3))

    class Halving(Turning):
        def mix(self, x, state, lengths, want):
            out = super().mix(x, state, lengths, want)
            return out._replace(state=torch.zeros(x.shape[0], x.shape[1] // 2))

    with pytest.raises(
        RunError, match=r"axis 1 of next.layers.0 has the sizes \(3, 3, 2\) at \(batch, length\) \(\(2, 7\), \(3, 7\), \(2, 5\)\)"
    ):
        graphs(Stack(V, 16, 1, partial(Halving, state="none"), position="none"))
