"""The plots of a run: what is drawn is what was stored, and each mistake is a sentence."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from lab.analysis import plot_attention, plot_delimiter_wave, plot_history
from lab.analysis.snapshots import read_snapshot, write_snapshot
from lab.training import RunError

L, H, PROMPT = 6, 3, 4


@pytest.fixture
def run(tmp_path):
    """Snapshots of steps 0, 10 and 30: two layers, two samples, the second with one token of padding."""
    theta = np.random.default_rng(0).uniform(-7, 7, (2, 2, L, H)).astype(np.float32)
    r = np.abs(np.exp(1j * theta).mean(-1)).astype(np.float32)
    weights = np.tril(np.ones((L, L))) / np.arange(1, L + 1)[:, None]
    for step in (0, 10, 30):
        more = {"tokens": np.zeros((2, L)), "omega": np.ones((2, H)), "kappa": np.ones((2, H)), "prompt_len": np.int64(PROMPT)}
        write_snapshot(tmp_path, "phases", step, theta=theta + step, r=r, lengths=np.array([L, L - 1]), **more)
        write_snapshot(
            tmp_path, "attention", step, attention=np.tile(weights, (2, H, 1, 1)), tokens=np.zeros(L), prompt_len=np.int64(PROMPT)
        )
    return tmp_path


@pytest.mark.parametrize(("asked", "found"), [(None, 30), (0, 0), (19, 10), (20, 10), (21, 30), (10**6, 30)])
def test_the_nearest_snapshot_is_taken(run, asked, found):
    assert read_snapshot(run, "phases", asked)["step"] == found
    assert f"step {found}" in plot_delimiter_wave(logdir=str(run), step=asked).get_suptitle()
    assert f"step {found}" in plot_attention(logdir=run, step=asked).axes[0].get_title()


def test_the_delimiter_wave(run):
    figure = plot_delimiter_wave(run, step=10, layer=1, sample=1)
    stored = read_snapshot(run, "phases", 10)
    top, bar, middle, bottom = sorted(figure.axes, key=lambda axes: (-axes.get_position().y0, axes.get_position().x0))
    theta = stored["theta"][1, 1, : L - 1]
    np.testing.assert_allclose(top.images[0].get_array(), theta.T % (2 * np.pi), atol=1e-5)
    assert top.images[0].get_cmap().name == "twilight" and top.images[0].get_clim() == (0, 2 * np.pi)
    np.testing.assert_allclose(middle.lines[0].get_ydata(), stored["r"][1, 1, : L - 1])
    velocity = np.array([line.get_ydata() for line in bottom.lines[:H]]).T
    np.testing.assert_allclose(np.exp(1j * velocity), np.exp(1j * np.diff(theta, axis=0)), atol=1e-4)
    assert abs(velocity).max() <= np.pi
    np.testing.assert_allclose(bottom.lines[H].get_ydata(), velocity.mean(1), atol=1e-6)
    for axes in (top, middle, bottom):
        assert axes.lines[-1].get_xdata() == [PROMPT - 1, PROMPT - 1]
    assert (top.get_ylabel(), bar.get_ylabel(), bottom.get_xlabel()) == ("head", "phase θ (rad)", "token t")


def test_a_task_without_a_delimiter_has_no_line(tmp_path):
    shape = (1, 1, L, H)
    write_snapshot(tmp_path, "phases", 5, theta=np.zeros(shape), r=np.ones(shape[:3]), lengths=np.array([L]), prompt_len=np.int64(0))
    figure = plot_delimiter_wave(tmp_path)
    assert not figure.axes[0].lines and not figure.axes[0].texts


def test_the_attention_maps(run):
    axes = plot_attention(run).axes[0]
    drawn = axes.images[0].get_array()
    stored = read_snapshot(run, "attention")["attention"]
    step = drawn.shape[1] // (H - 1) if H == 1 else (drawn.shape[1] - L) // (H - 1)
    for layer in range(2):
        for head in range(H):
            part = drawn[layer * step : layer * step + L, head * step : head * step + L]
            below = np.tri(L, dtype=bool)
            np.testing.assert_allclose(np.asarray(part)[below] ** 2, stored[layer, head][below], atol=1e-3)
            assert np.ma.getmaskarray(part)[~below].all()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["head 0", "head 1", "head 2"]


@pytest.mark.parametrize("name", ["wave.png", "wave.pdf", "wave.svg"])
def test_a_plot_is_saved(run, name):
    plot_delimiter_wave(run, output=run / name)
    assert (run / name).stat().st_size > 5000


def test_learning_curves(tiny):
    one, two = tiny(run_dir="runs/one/a"), tiny("seed=3", run_dir="runs/two/a")
    figure = plot_history(one.path, output="curves.png")
    assert [axes.get_title() for axes in figure.axes] == ["cross-entropy (nats per token)", "exact match"]
    train, val = figure.axes[0].lines
    history = one.history()
    np.testing.assert_allclose(train.get_ydata(), history["train/ce_loss"])
    assert list(val.get_xdata()) == [6, 12] and [train.get_label(), val.get_label()] == ["train", "val"]
    figure = plot_history([one.path, two.path], metrics=["sync_order"])
    assert [line.get_label() for line in figure.axes[0].lines] == ["one/a, train", "two/a, train"]
    with pytest.raises(RunError, match="no run has logged a metric accuracy; there are ce_loss, diversity, exact_match"):
        plot_history(one.path, metrics=["accuracy"])
    with pytest.raises(RunError, match="runs/one/a has no snapshots in phases/; callbacks.phases.interval writes them, for models that"):
        plot_delimiter_wave(one.path)


def test_mistakes_are_sentences(run):
    with pytest.raises(RunError, match="nowhere: there is no such run folder"):
        plot_delimiter_wave("nowhere")
    with pytest.raises(RunError, match="layer=2: the snapshot has the layers 0, 1"):
        plot_delimiter_wave(run, layer=2)
    with pytest.raises(RunError, match="sample=2: the snapshot has the samples 0 to 1; callbacks.phases.samples sets how many"):
        plot_delimiter_wave(run, sample=2)
    with pytest.raises(RunError, match="not a run of lab"):
        plot_history(run)
    (run / "phases" / "step_00000030.npz").write_bytes(b"half")
    with pytest.raises(RunError, match="step_00000030.npz cannot be read"):
        plot_delimiter_wave(run)


def test_plots_need_no_display_no_pyplot_and_no_torch(run):
    code = (
        "import sys, lab.analysis\n"
        "assert not {'matplotlib', 'numpy', 'torch'} & set(sys.modules)\n"
        f"lab.analysis.plot_delimiter_wave({str(run)!r}, output={str(run / 'x.png')!r})\n"
        "assert not {'matplotlib.pyplot', 'torch', 'pytorch_lightning'} & set(sys.modules)\n"
    )
    assert (
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code], env={"PATH": "", "PYTHONPATH": ":".join(sys.path)}, timeout=120
        ).returncode
        == 0
    )
