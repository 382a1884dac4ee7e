"""What is broken in an exported file is found, and nothing is left of it."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from export_checks import GRAPHS, at_once, export, exported, run  # noqa: F401 (fixtures)
from test_models import V, lattice

from lab.cli.export import main
from lab.export import isolated, verify
from lab.mixers import Attention
from lab.models import Stack
from lab.training import RunError

ROOT = Path(__file__).parents[1]


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
