"""Plots of a run, each a matplotlib Figure: no pyplot, no display, no state shared with the caller's own plots.

    plot_delimiter_wave(run, step)    the phases of one sample, their order and their velocity
    plot_attention(run, step)         the attention weights of one sample, a panel for each head
    plot_history(run, ...)            learning curves, of several runs too

Each takes `output`, a file to save to (png, pdf, svg by its ending). RunError in one sentence where a run lacks what is to be shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lab.analysis.snapshots import read_snapshot
from lab.training.run import Run, RunError

RunPath = str | Path
SIZE = 9  # points, of all text
DELIMITER = {"color": "crimson", "linewidth": 1.2}
TITLES = {"loss": "loss", "ce_loss": "cross-entropy (nats per token)", "exact_match": "exact match", "sync_order": "synchronisation r"}


def plot_delimiter_wave(
    logdir: RunPath, step: int | None = None, layer: int = -1, sample: int = 0, output: RunPath | None = None
) -> Figure:
    """The phases of one sample of the snapshot nearest to `step` (None: the last one), in one layer (-1: the topmost)."""
    return _save(delimiter_wave(read_snapshot(logdir, "phases", step), layer, sample), output)


def plot_attention(logdir: RunPath, step: int | None = None, output: RunPath | None = None) -> Figure:
    """The attention weights of the first sample in the snapshot nearest to `step` (None: the last one): a row for each layer."""
    return _save(attention_maps(read_snapshot(logdir, "attention", step)), output)


def plot_history(
    logdir: RunPath | Sequence[RunPath], metrics: Sequence[str] = ("ce_loss", "exact_match"), output: RunPath | None = None
) -> Figure:
    """A panel for each metric over the steps: training as a thin line, validation as points. Several runs have a colour each."""
    paths = [logdir] if isinstance(logdir, str | Path) else list(logdir)
    histories = {_label(path, paths): Run.open(path).history() for path in paths}
    return _save(learning_curves(histories, metrics), output)


# ----------------------------------------------------------------------- drawing


def delimiter_wave(snapshot: Mapping[str, np.ndarray], layer: int = -1, sample: int = 0) -> Figure:
    """The (L, H) phase map on a cyclic colour map; below it r(t), and the phase velocity of each head."""
    n_layers, n_samples = snapshot["theta"].shape[:2]
    if not -n_layers <= layer < n_layers:
        raise RunError(f"layer={layer}: the snapshot has the layers 0 to {n_layers - 1}")
    if not -n_samples <= sample < n_samples:
        raise RunError(f"sample={sample}: the snapshot has the samples 0 to {n_samples - 1}; callbacks.phases.samples sets how many")
    length = int(snapshot["lengths"][sample])
    theta = snapshot["theta"][layer, sample, :length] % (2 * np.pi)  # (L, H)
    r = snapshot["r"][layer, sample, :length]
    velocity = (np.diff(theta, axis=0) + np.pi) % (2 * np.pi) - np.pi  # the shorter way round, from token to token
    heads = theta.shape[1]

    figure = Figure(figsize=(7, 4.6), dpi=100, layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 1])
    extent = (-0.5, length - 0.5, heads - 0.5, -0.5)
    image = top.imshow(theta.T, cmap="twilight", vmin=0, vmax=2 * np.pi, aspect="auto", interpolation="nearest", extent=extent)
    bar = figure.colorbar(image, ax=top, pad=0.01, aspect=12)
    bar.set_ticks([0, np.pi, 2 * np.pi], labels=["0", "π", "2π"])
    bar.set_label("phase θ (rad)", size=SIZE)
    bar.ax.tick_params(labelsize=SIZE)
    top.set_ylabel("head", size=SIZE)
    top.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))

    middle.plot(np.arange(length), r, color="black", linewidth=1.3)
    middle.set_ylim(0, 1)
    middle.set_yticks([0, 0.5, 1])
    middle.set_ylabel("order r", size=SIZE)

    between = np.arange(length - 1) + 0.5
    bottom.plot(between, velocity, color="tab:blue", linewidth=0.6, alpha=0.5)
    bottom.plot(between, velocity.mean(1), color="black", linewidth=1.3, label="mean over heads")
    bottom.plot([], [], color="tab:blue", linewidth=0.6, label="one head")
    bottom.set_ylabel("velocity\n(rad / token)", size=SIZE)
    bottom.set_xlabel("token t", size=SIZE)
    bottom.xaxis.set_major_locator(MaxNLocator(10, integer=True))

    prompt_len = int(snapshot["prompt_len"])
    for axes in (top, middle, bottom):
        axes.tick_params(labelsize=SIZE)
        if 0 < prompt_len <= length:
            axes.axvline(prompt_len - 1, **DELIMITER, label="delimiter")
    _legend(bottom)
    figure.suptitle(f"step {int(snapshot['step']):,}, layer {layer % n_layers} of {n_layers}, sample {sample % n_samples}", size=SIZE + 1)
    return figure


def attention_maps(snapshot: Mapping[str, np.ndarray]) -> Figure:
    """(layers, H) panels of queries by keys, on one logarithmic-like scale: the square root of the weight."""
    weights = snapshot["attention"].astype(np.float32)  # (layers, H, L, L)
    n_layers, heads, length, _ = weights.shape
    prompt_len = int(snapshot["prompt_len"])
    figure = Figure(figsize=(1.15 * heads + 1.2, 1.25 * n_layers + 0.9), dpi=100, layout="constrained")
    grid = figure.subplots(n_layers, heads, squeeze=False, sharex=True, sharey=True)
    for (layer, head), axes in np.ndenumerate(grid):
        image = axes.imshow(weights[layer, head] ** 0.5, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        if 0 < prompt_len <= length:
            axes.axvline(prompt_len - 1, color="white", linewidth=0.5)
            axes.axhline(prompt_len - 1, color="white", linewidth=0.5)
        axes.tick_params(labelsize=SIZE - 2)
        axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        if layer == 0:
            axes.set_title(f"head {head}", size=SIZE)
        if head == 0:
            axes.set_ylabel(f"layer {layer}", size=SIZE)
    ticks = np.array([0, 0.1, 0.25, 0.5, 1])
    bar = figure.colorbar(image, ax=grid, pad=0.01, aspect=25)
    bar.set_ticks(list(ticks**0.5), labels=[f"{tick:g}" for tick in ticks])
    bar.ax.tick_params(labelsize=SIZE)
    bar.set_label("attention weight", size=SIZE)
    figure.supxlabel("key token s", size=SIZE)
    figure.supylabel("query token t", size=SIZE)
    lines = ", white lines: the delimiter" if 0 < prompt_len <= length else ""
    figure.suptitle(f"step {int(snapshot['step']):,}{lines}", size=SIZE + 1)
    return figure


def learning_curves(histories: Mapping[str, Any], metrics: Sequence[str]) -> Figure:
    """histories: tables of `Run.history()` by label."""
    if not metrics:
        raise ValueError("metrics is empty; name one, such as ce_loss")
    figure = Figure(figsize=(3.6 * len(metrics) + 0.2, 3.0), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        if not any(f"{part}/{metric}" in table for table in histories.values() for part in ("train", "val")):
            logged = {tuple(name.split("/", 1)) for table in histories.values() for name in table}
            known = sorted({name for part, name in logged if part in ("train", "val")})
            raise RunError(f"no run has logged a metric {metric}; there are {', '.join(known)}")
        for i, (label, table) in enumerate(histories.items()):
            for part, style in (("train", {"linewidth": 0.9, "alpha": 0.7}), ("val", {"linewidth": 1.3, "marker": "o", "markersize": 3.5})):
                if f"{part}/{metric}" in table:
                    values = table[f"{part}/{metric}"].dropna()
                    name = part if len(histories) == 1 else f"{label}, {part}"
                    colour = f"C{0 if part == 'train' else 1}" if len(histories) == 1 else f"C{i}"
                    axes.plot(values.index, values, color=colour, label=name, **style)
        axes.set_xlabel("optimiser step", size=SIZE)
        axes.set_title(TITLES.get(metric, metric), size=SIZE + 1)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=SIZE)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _legend(panels[0])
    return figure


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=SIZE - 1.5, frameon=False, loc="best")


def _label(path: RunPath, paths: Sequence[RunPath]) -> str:
    """The shortest end of a path that no other one has."""
    parts = Path(path).parts
    for n in range(1, len(parts)):
        if sum(Path(other).parts[-n:] == parts[-n:] for other in paths) == 1:
            return "/".join(parts[-n:])
    return str(path)


def _save(figure: Figure, output: RunPath | None) -> Figure:
    if output is not None:
        figure.savefig(output, dpi=150)
    return figure
