"""Every experiment of the repository: composes, is valid, and learns one batch by heart when shrunk."""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path

import pytest
import torch

from lab.analysis.metrics import cross_entropy, run
from lab.config import build, check, check_late, compose
from lab.mixers.lattice import neighbour_weights
from lab.tasks import TrainLoader, enwik8
from lab.training.experiment import prepare

ROOT = Path(__file__).parents[1] / "experiments"
EXPERIMENTS = sorted(str(file.relative_to(ROOT).with_suffix("")) for file in ROOT.rglob("*.yaml"))
LARGE = (  # long sequences: most of the time of all
    "copy_reverse", "copy_reverse_vanilla", "serriform_documented", "stdlib_lot", "stdlib_serriform", "stdlib_transformer",
    "text_small_mamba", *(name for name in EXPERIMENTS if name.startswith("enwik8")),
)  # fmt: skip
ON_ENWIK8 = tuple(name for name in EXPERIMENTS if name.startswith("enwik8"))
SMALL = (
    "model.d_model=48",  # a multiple of all n_heads
    "model.n_layers=2",
    "model.dropout=0.0",
    "trainer.batch_size=8",
    "trainer.max_steps=30",
    "trainer.max_epochs=null",
)


@pytest.fixture
def some_text(monkeypatch):
    """What the experiments on enwik8 and on a text of one's own ask for: a text in its place. The words that say so, by experiment."""
    text = Path(argparse.__file__).read_bytes() * 2
    (folder := Path(os.environ["LAB_DATA"])).mkdir(exist_ok=True)
    (folder / "enwik8").write_bytes(text)
    monkeypatch.setattr(enwik8, "SIZE", len(text))
    monkeypatch.setattr(enwik8, "SHA256", hashlib.sha256(text).hexdigest())
    return {name: ["task.limit_bytes=null"] for name in ON_ENWIK8} | {"text_small_mamba": [f"task.path={argparse.__file__}"]}


def test_there_are_experiments():
    assert {"none", "copy_reverse", "copy_reverse_small", "copy_reverse_small_vanilla"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in EXPERIMENTS])
def test_the_loss_falls_on_one_repeated_batch(name, some_text):
    composed = compose([f"experiment={name}", *some_text.get(name, []), *SMALL], matching=False)  # SMALL says the width
    check(composed)
    check_late(composed)
    experiment = prepare(composed.config)
    (batch,) = next(iter(TrainLoader(experiment.task.split("train"), 8, 1, 1, experiment.seed)))
    optimizer = torch.optim.AdamW(experiment.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(50):
        loss = cross_entropy(run(experiment.model, batch, want=("losses",)).y, batch.targets).sum() / (batch.targets >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "names",
    [("copy_reverse", "copy_reverse_vanilla"), ("copy_reverse_small", "copy_reverse_small_vanilla"), ("stdlib_lot", "stdlib_transformer")],
)
def test_the_baseline_has_as_many_parameters(names):
    lattice, vanilla = (prepare(compose([f"experiment={name}"]).config).model for name in names)
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in (lattice, vanilla))
    assert abs(ours - theirs) / theirs < 1e-3


MILLIONS = {"transformer": (37, 42), "lot": (88, 92), "mamba": (88, 92), "s4": (165, 180), "serriform": (35, 42), "laminar": (35, 42)}


@pytest.mark.parametrize("name", ON_ENWIK8)
def test_experiments_on_enwik8(name):
    """They are valid, and as large as they say; the small ones are small, and say in their data that it is a part."""
    composed = compose([f"experiment={name}"])
    check(composed)
    check_late(composed)
    with torch.device("meta"):
        millions = sum(p.numel() for p in build(composed.config["model"], None).parameters()) / 1e6
    low, high = (0.6, 0.8) if "_small_" in name else MILLIONS[name.removeprefix("enwik8_")]
    assert low < millions < high and (composed.config["task"]["limit_bytes"] is not None) == ("_small_" in name)


def test_the_documented_size():
    config = compose(["experiment=copy_reverse"]).config
    documented = {
        "model": {"vocab_size": 1000, "d_model": 256, "n_layers": 6},
        "task": {"seq_len": 128, "n_train": 50000},
        "trainer": {"batch_size": 128, "max_epochs": 50},
        "optimizer": {"lr": 3e-4, "weight_decay": 0.01},
    }
    for node, values in documented.items():
        assert {key: config[node][key] for key in values} == values
    mixer = prepare(config).model.blocks[0].mixer
    assert mixer.n_heads == 8 and torch.equal(mixer.W, neighbour_weights((2, 4), "moore", "open"))


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if "serriform" in name])
def test_serriformnet_can_lose_its_experts(name):
    composed = compose([f"experiment={name}", "feed_forward=none"])
    check(composed)
    assert "feed_forward" not in composed.config["model"] and composed.config["loss_weights"] == {}
