"""lab.train and what a run gives in Python: results, exceptions with one sentence, and a process that is left as it was."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, rows

import lab
from lab import ops
from lab.config import ConfigError
from lab.ops import native
from lab.training import Run, RunError

WORDS = [*TINY, "trainer.max_steps=4", "trainer.val_every=2"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_and_its_results():
    run = lab.train(overrides=WORDS, run_dir="my run, the first")
    assert run.path == Path("my run, the first") and run.job()["status"] == "done"
    assert run.metrics["split"] == "val" and 0 <= run.metrics["metrics"]["exact_match"] <= 1
    history = run.history()
    assert list(history.index) == [1, 2, 3, 4] and history.index.name == "step"
    assert history["train/ce_loss"].notna().all() and list(history["val/ce_loss"].dropna().index) == [2, 4]
    assert {str(kind) for kind in history.dtypes} == {"float64"}
    for row in rows(run.path):
        for name, value in row.items():
            assert name == "step" or history.loc[row["step"], name] == value
    model = run.model()
    assert not model.training
    tokens = torch.randint(3, 12, (2, 8))
    assert torch.equal(model(tokens), lab.load(run.path)[0](tokens))
    assert not torch.equal(run.model("last")(tokens), model(tokens)) or run.metrics["step"] == 4
    assert lab.train(overrides=WORDS, run_dir="my run, the first").metrics == run.metrics  # finished: nothing to do


def test_an_experiment_by_name_or_by_file():
    named = lab.train("copy_reverse_small", [*WORDS, "trainer.max_steps=1"])
    assert named.path.parent == Path("runs/copy_reverse_small") and named.hparams()["seed"] == 42
    Path("mine.yaml").write_text("# @package _global_\nseed: 7\n")
    assert lab.train(config="mine.yaml", overrides=[*WORDS, "trainer.max_steps=1"]).hparams()["seed"] == 7


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"experiment": "copy_revers"}, "experiment=copy_revers .*did you mean copy_reverse"),
        ({"experiment": "copy_reverse", "config": "x.yaml"}, "an experiment is given by its name or by its file, not both"),
        ({"overrides": "seed=1"}, "overrides='seed=1' must be a list of words"),
        ({"overrides": ["model.n_layer=2"]}, "did you mean model.n_layers"),
        ({"overrides": ["resume=runs/x"]}, "run_dir=RUN continues a run of the same config"),
        ({"overrides": [*TINY, "trainer.devices=2"]}, "from Python a training has one device"),
    ],
)
def test_a_mistake_is_an_exception_with_one_sentence(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        lab.train(**arguments)
    assert "\n" not in str(caught.value) and not list(Path().iterdir())


def test_the_process_is_left_as_it_was(monkeypatch):
    """Words of somebody else's command line, forced ops, random states, switches, handlers, the environment."""
    monkeypatch.setattr(sys, "argv", ["notebook", "--no-such-option"])
    lab.train(overrides=WORDS, run_dir="first")  # what imports do to the environment stays
    torch.manual_seed(5), np.random.seed(5), random.seed(5)

    def state():
        return (
            torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), dict(os.environ),
            dict(ops.backend._forced),
            torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory,
            signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
        )  # fmt: skip

    before = state()
    run = lab.train(overrides=[*WORDS, "ops.kuramoto_scan=reference"], run_dir="run")
    assert run.metrics["backends"]["kuramoto_scan"] == "reference"
    run.model()
    lab.load("run")
    assert state() == before
    with pytest.raises(RunError):
        lab.train(overrides=[*WORDS, "optimizer.lr=1e30", "trainer.grad_clip=null", "ops.kuramoto_scan=reference"], run_dir="other")
    assert state() == before
    here = "native" if native.LIBRARY else "torch"
    assert lab.train(overrides=WORDS, run_dir="third").metrics["backends"] == {"kuramoto_scan": here, "decode": here}


def test_twice_in_one_process_is_twice_the_same():
    one, two = (lab.train(overrides=WORDS, run_dir=name) for name in ("one", "two"))
    drop = ["train/tokens_per_second", "train/seconds"]
    assert one.history().drop(columns=drop).equals(two.history().drop(columns=drop))


def test_in_a_thread():
    """Where signal handlers cannot be set."""
    found = []
    thread = threading.Thread(target=lambda: found.append(lab.train(overrides=WORDS, run_dir="run")))
    thread.start()
    thread.join()
    assert found and found[0].job()["status"] == "done"


def test_the_stop_button_saves_and_is_an_exception():
    """A notebook's stop button is SIGINT."""
    Path("stopper.py").write_text(
        "import os, signal\nimport pytorch_lightning as pl\n"
        "class Stopper(pl.Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, index):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
    )
    with pytest.raises(RunError, match="stopped by SIGINT after step 1, which is saved"):
        lab.train(overrides=[*WORDS, "+callbacks.stopper._target_=stopper.Stopper"], run_dir="run")
    assert Run("run").job()["status"] == "interrupted" and Run("run").last.exists()
    with pytest.raises(RunError, match="run has no metrics.json yet; it is interrupted"):
        _ = Run("run").metrics


def test_a_run_that_logged_nothing():
    with pytest.raises(RunError, match="run has logged nothing yet; it is not begun"):
        Run("run").history()


def test_the_notebook_runs(tmp_path):
    """docs/quickstart.ipynb with a tiny budget: the cell tagged `parameters` is where a reader would change it, too."""
    import nbformat
    from nbclient import NotebookClient

    root = Path(__file__).parents[1]
    notebook = nbformat.read(root / "docs" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is committed without outputs"
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    tiny = [word for word in WORDS if not word.startswith("~callbacks")]
    parameters.source = f"overrides = {tiny!r}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    said = [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert any("exact_match" in str(output) for output in outputs)
    # tqdm, which torchmetrics loads by way of transformers where that is installed; and warnings where there are no kernels
    assert all("IProgress not found" in text or native.LIBRARY is None for text in said)
