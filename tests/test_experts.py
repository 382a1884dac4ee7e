"""Experts in a run: chosen by feed_forward=moe, trained with their losses, watched and drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import TINY, rows
from test_monitoring import events

from lab.analysis import plot_expert_history, plot_experts
from lab.analysis.snapshots import read_snapshot, snapshot_steps, write_snapshot
from lab.config import ConfigError, check, compose
from lab.config.explanation import explain
from lab.training import RunError, evaluate_run

MOE = ("feed_forward=moe", "model.feed_forward.d_ff=8", "model.feed_forward.n_experts=5", "model.n_layers=2")
WATCHED = ("+callbacks.experts._target_=lab.training.Experts", "+callbacks.experts.interval=5")
SCALARS = ("usage_entropy", "max_share", "min_share", "dead_experts")


@pytest.fixture
def watched(tiny):
    return tiny(*MOE, *WATCHED)


def test_a_run(watched):
    logged = rows("run")
    names = ("balance", "entropy", "z", "loss", "ce_loss")
    losses = {name: [row[f"train/{name}"] for row in logged if f"train/{name}" in row] for name in names}
    assert all(len(values) == 12 and np.isfinite(values).all() for values in losses.values())
    assert 1 <= min(losses["balance"]) and max(losses["balance"]) < 5
    weighted = 0.01 * np.array(losses["balance"]) + 0.001 * np.array(losses["z"])  # the diversity of lot has its own weights
    assert (np.array(losses["loss"]) > np.array(losses["ce_loss"]) + weighted - 1e-6).all()

    assert list(snapshot_steps("run", "experts")) == [0, 5, 10, 12]
    stored = read_snapshot("run", "experts", 5)
    assert {name: value.shape for name, value in stored.items()} == {
        "step": (), "tokens": (), "usage": (2, 5), "probability": (2, 5), "layers": (2,),
    }  # fmt: skip
    np.testing.assert_allclose(stored["usage"].sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(stored["probability"].sum(1), 1, atol=1e-6)
    assert stored["tokens"] == 4 * 8
    (seen,) = (row for row in logged if row["step"] == 5 and "watch_experts/max_share_layer_1" in row)
    usage = stored["usage"][1]
    want = (-sum(u * math.log(u) for u in usage if u) / math.log(5), usage.max(), usage.min(), (usage == 0).sum())
    for name, value in zip(SCALARS, want, strict=True):
        assert seen[f"watch_experts/{name}_layer_1"] == pytest.approx(value, abs=1e-5)
    assert events(watched)["images"] == {"watch_experts/usage": [0, 5, 10, 12]}

    figure = plot_expert_history(watched.path, output="history.png")
    assert [axes.images[0].get_array().shape for axes in figure.axes[:2]] == [(5, 4)] * 2
    np.testing.assert_allclose(figure.axes[1].images[0].get_array()[:, 1].filled(0), usage)
    with pytest.raises(RunError, match=r"layers=\[2\]: the run has experts in the layers 0, 1"):
        plot_expert_history(watched.path, layers=[2])

    small = evaluate_run("run", ["trainer.batch_size=3"], [])[0]["metrics"]  # losses of the whole split, however it is cut
    large = evaluate_run("run", ["trainer.batch_size=100"], [])[0]["metrics"]
    for name in ("balance", "entropy", "z"):
        assert small[name] == pytest.approx(large[name], rel=1e-5)


def test_the_picture_of_a_step(tmp_path):
    usage = np.array([[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    write_snapshot(tmp_path, "experts", 7, usage=usage, probability=usage, tokens=np.int64(12), layers=np.array([1, 3]))
    figure = plot_experts(tmp_path, output=tmp_path / "usage.png")
    axes = figure.axes[0]
    assert axes.get_title() == "step 7, 12 tokens" and [label.get_text() for label in axes.get_yticklabels()] == ["layer 1", "layer 3"]
    assert [text.get_text() for text in axes.texts] == ["50", "50", "0", "0", *["25"] * 4]
    assert axes.images[0].get_array().mask.sum() == 2 and axes.images[0].get_clim() == (0, 0.5)  # dead experts are white
    with pytest.raises(
        RunError, match="has no snapshots in experts/; callbacks.experts.interval writes them, for models that record the choice of"
    ):
        plot_experts(tmp_path.parent)


@pytest.mark.parametrize("model", ["transformer", "mamba", "h3_attention"])
def test_any_model_of_a_stack_takes_experts(model):
    composed = compose([f"model={model}", "feed_forward=moe", "trainer.max_steps=1"])
    check(composed)
    assert composed.config["model"]["feed_forward"]["_target_"] == "lab.layers.MoE"
    assert composed.config["loss_weights"] == {"balance": 0.01, "entropy": 0.0, "z": 0.001}
    assert composed.config["callbacks"]["experts"]["interval"] == 200


def test_what_is_explained():
    assert explain("feed_forward", ["feed_forward=moe"]).splitlines()[0] == "feed_forward = moe, of moe, moe_narrow, none; it sets"
    assert explain("feed_forward", []) == "feed_forward = none, of moe, moe_narrow, none; it sets nothing"
    assert "model.feed_forward.n_experts = 4" in explain("model.feed_forward", ["feed_forward=moe"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("feed_forward=mo",), r"feed_forward=mo \(command line\): there is no such option; did you mean moe\?"),
        (("feed_foward=moe",), r"feed_foward.*did you mean feed_forward\?"),
        ((*MOE, "model.feed_forward.n_expert=2"), "did you mean model.feed_forward.n_experts?"),
        ((*MOE, "model.feed_forward.top_k=9"), "MoE: top_k=9 must be at most n_experts=5"),
        ((*MOE, "model.d_ff=64"), r"model.d_ff \(command line\): Stack: d_ff=64 is the width of the MLP"),
        (("model.feed_forward.n_experts=8",), "an option, whose values these may be, is chosen by feed_forward=NAME"),
        (("model.feed_forward=moe",), "an option is chosen by feed_forward=moe"),
        (("loss_weights.balance=1",), "the model has no auxiliary loss balance.*; feed_forward=moe gives it one"),
        (
            (*MOE[:1], "model.feed_forward=null"),
            "no auxiliary loss balance.*; feed_forward=moe gives .*, feed_forward=none takes its weight",
        ),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, tmp_path, monkeypatch):
    from lab.training import train

    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, RunError), match=sentence):
        train(compose([*TINY, *words, "run_dir=run"]))
