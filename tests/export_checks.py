"""What the tests of lab-export share: an export of random weights, what its manifest must say, and a run that was exported once."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from conftest import TINY
from test_models import V

from lab.analysis.conformance import randomise
from lab.cli.export import main
from lab.config import compose
from lab.export import FORMATS, export_model, isolated, verify
from lab.models import initialise
from lab.training import train

GRAPHS, OF_SOURCE = ["sequence", "prefill", "step"], ["sequence", "encoder", "decoder", "step"]


def export(model, format: str, folder: Path, longest: int = 24) -> dict:
    """The manifest of a model with random weights."""
    initialise(model, 0)
    randomise(model, 0)
    return export_model(model, format, folder / f"model{FORMATS[format].suffix}", V, longest)[0]


def check(manifest: dict) -> None:
    """Every graph was compared, at a batch of 1 and others, at a length of 1, odd ones and one longer than the example."""
    found = [graph["name"] for graph in manifest["graphs"]]
    assert found == (OF_SOURCE if "encoder" in found else GRAPHS)
    cases = manifest["verification"]["cases"]
    assert all(case["largest_difference"] < 1e-4 for case in cases)
    for graph in (graph for graph in found if graph != "encoder"):
        sizes = [(case["batch"], case["length"]) for case in cases if case["graph"] == graph]
        assert {1, 3} <= {B for B, _ in sizes} and max(L for _, L in sizes) > 7 and any(L % 2 for _, L in sizes)
        assert graph == "step" or (1, 1) in sizes


@pytest.fixture
def at_once(monkeypatch):
    """The files are verified in this process: importing torch in a fresh one takes longer than all the rest."""

    def run(manifest, tokens):
        document = json.loads(manifest.read_text())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = isolated.load(document, manifest.parent)
        sources = {case.removeprefix(isolated.SOURCE_OF): s.numpy() for case, s in tokens.items() if case.startswith(isolated.SOURCE_OF)}
        cases = {case: t.numpy() for case, t in tokens.items() if not case.startswith(isolated.SOURCE_OF)}
        return {case: isolated.answer(document, loaded, case, t, sources.get(case)) for case, t in cases.items()}

    monkeypatch.setattr(verify, "run_isolated", run)


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
