"""lab-export on a run: what it writes and says, the documented programs that use it, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from export_checks import GRAPHS, at_once, check, exported, run  # noqa: F401 (fixtures)

import lab
from lab import ops
from lab.cli.export import main
from lab.config import ConfigError, compose
from lab.export import export as export_module
from lab.export import export_run, formats
from lab.ops import backend
from lab.tasks import CopyReverse, Corpus
from lab.training import train

ROOT = Path(__file__).parents[1]


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
    monkeypatch.setattr(CopyReverse, "encoding", Corpus.encoding)
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
