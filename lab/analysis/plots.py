"""Plots of a run, each a matplotlib Figure: no pyplot, no display, no state shared with the caller's own plots.

    plot_delimiter_wave(run, step)    the phases of one sample, their order and their velocity
    plot_attention(run, step)         the attention weights of one sample, a panel for each head
    plot_history(run, ...)            learning curves, of several runs too
    plot_receptive_field(run)         how far back a model sees, of several runs too

Those of state spaces: lab/analysis/state_space_plots.py. Each takes `output`, a file to save to (png, pdf, svg by its
ending). RunError in one sentence where a run lacks what is to be shown.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lab.analysis.snapshots import read_snapshot
from lab.training.run import Run, RunError

RunPath = str | Path
SIZE = 9  # points, of all text
LOGARITHMIC = ("loss", "ce_loss")
TITLES = {"loss": "loss", "ce_loss": "cross-entropy (nats per token)", "exact_match": "exact match", "sync_order": "synchronisation r"}


class Plot(Figure):
    """A matplotlib Figure that a notebook shows by itself; one that pyplot does not know has no picture there."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


def plot_delimiter_wave(
    logdir: RunPath, step: int | None = None, layer: int | None = None, sample: int = 0, output: RunPath | None = None
) -> Plot:
    """The phases of one sample of the snapshot nearest to `step` (None: the last one), in one layer (None: the first that has phases)."""
    return save(delimiter_wave(read_snapshot(logdir, "phases", step), layer, sample), output)


def plot_attention(logdir: RunPath, step: int | None = None, output: RunPath | None = None, kind: str = "attention") -> Plot:
    """The attention weights of the first sample in the snapshot nearest to `step` (None: the last one): a row for each layer. kind: also
    cross_attention (to the source) and encoder_attention, of an encoder-decoder."""
    return save(attention_maps(read_snapshot(logdir, "attention", step), kind), output)


def plot_history(
    logdir: RunPath | Sequence[RunPath], metrics: Sequence[str] = ("ce_loss", "exact_match"), output: RunPath | None = None
) -> Plot:
    """A panel for each metric over the steps: training as a thin line, validation as points. Several runs have a colour each."""
    paths = [logdir] if isinstance(logdir, str | Path) else list(logdir)
    histories = {label(path, paths): Run.open(path).history() for path in paths}
    return save(learning_curves(histories, metrics), output)


def plot_receptive_field(
    logdir: RunPath | Sequence[RunPath], length: int | None = None, checkpoint: str = "best", output: RunPath | None = None
) -> Plot:
    """How strongly the last logit depends on each token before it, measured on the weights of one or several runs. length: tokens; None:
    enough to show what the models remember, 2,048 at most."""
    paths = [logdir] if isinstance(logdir, str) or not isinstance(logdir, Sequence) else list(logdir)
    return save(receptive_fields({label(path, paths): Run.open(path).model(checkpoint) for path in paths}, length), output)


# ----------------------------------------------------------------------- drawing


def delimiter_wave(snapshot: Mapping[str, np.ndarray], layer: int | None = None, sample: int = 0) -> Plot:
    """The (L, H) phase map on a cyclic colour map; below it r(t), and the phase velocity of each head."""
    n_layers, n_samples = snapshot["theta"].shape[:2]
    numbers = layer_numbers(snapshot, n_layers)
    place = numbers.index(layer) if layer in numbers else 0 if layer is None else layer if -n_layers <= layer < 0 else None
    if place is None:
        raise RunError(f"layer={layer}: the snapshot has the layers {', '.join(map(str, numbers))}")
    if not -n_samples <= sample < n_samples:
        raise RunError(f"sample={sample}: the snapshot has the samples 0 to {n_samples - 1}; callbacks.phases.samples sets how many")
    length = int(snapshot["lengths"][sample])
    theta = snapshot["theta"][place, sample, :length] % (2 * np.pi)  # (L, H)
    theta = theta[:, ~np.isnan(theta).all(0)]  # the heads that this layer has
    r = snapshot["r"][place, sample, :length]
    velocity = (np.diff(theta, axis=0) + np.pi) % (2 * np.pi) - np.pi  # the shorter way round, from token to token
    heads = theta.shape[1]

    figure = Plot(figsize=(7, 4.6), dpi=100)
    # Fixed places: a layout that adjusts itself draws everything twice, and training waits for this picture.
    grid = figure.add_gridspec(
        3, 2, height_ratios=[2, 1, 1], width_ratios=[60, 1], hspace=0.12, wspace=0.03, left=0.11, right=0.91, top=0.9
    )
    top = figure.add_subplot(grid[0, 0])
    middle, bottom = (figure.add_subplot(grid[row, 0], sharex=top) for row in (1, 2))
    extent = (-0.5, length - 0.5, heads - 0.5, -0.5)
    image = top.imshow(theta.T, cmap="twilight", vmin=0, vmax=2 * np.pi, aspect="auto", interpolation="nearest", extent=extent)
    bar = figure.colorbar(image, cax=figure.add_subplot(grid[0, 1]))
    bar.set_ticks([0, np.pi, 2 * np.pi], labels=["0", "π", "2π"])
    bar.set_label("phase θ (rad)", size=SIZE)
    bar.ax.tick_params(labelsize=SIZE)
    top.set_ylabel("head", size=SIZE)
    top.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))

    middle.plot(np.arange(length), r, color="black", linewidth=1.3)
    middle.set_ylim(0, 1.06)
    middle.set_yticks([0, 0.5, 1])
    middle.set_ylabel("order r", size=SIZE)

    between = np.arange(length - 1) + 0.5
    bottom.plot(between, velocity, color="tab:blue", linewidth=0.6, alpha=0.5)
    bottom.plot(between, velocity.mean(1), color="black", linewidth=1.3, label="mean over heads")
    bottom.plot([], [], color="tab:blue", linewidth=0.6, label="each head")
    low, high = bottom.get_ylim()
    bottom.set_ylim(low, high + 0.4 * (high - low))  # room for the legend
    bottom.legend(fontsize=SIZE - 1.5, frameon=False, loc="upper right", ncols=2, borderaxespad=0.1)
    bottom.set_ylabel("velocity\n(rad / token)", size=SIZE)
    bottom.set_xlabel("token t", size=SIZE)
    bottom.xaxis.set_major_locator(MaxNLocator(10, integer=True))

    prompt_len = int(snapshot["prompt_len"])
    for axes in (top, middle, bottom):
        axes.tick_params(labelsize=SIZE, labelbottom=axes is bottom)
        if 0 < prompt_len <= length:
            axes.axvline(prompt_len - 1, color="crimson", linewidth=1.2)
    if 0 < prompt_len <= length:
        top.text(prompt_len - 1, -0.6, "delimiter", color="crimson", size=SIZE, ha="center", va="bottom")
    figure.suptitle(f"step {int(snapshot['step']):,}, layer {numbers[place]}, sample {sample % n_samples}", size=SIZE + 1)
    return figure


def layer_numbers(snapshot: Mapping[str, np.ndarray], n_layers: int, key: str = "layers") -> list[int]:
    """The layers of a snapshot by their numbers in the model; one of an older version has all of the model's."""
    return [int(i) for i in snapshot.get(key, np.arange(n_layers))]


def attention_maps(snapshot: Mapping[str, np.ndarray], kind: str = "attention") -> Plot:
    """A row of maps for each layer, one for each head, queries downwards and keys to the right. The colour is the root of the weight."""
    if kind not in snapshot:
        raise RunError(f"the snapshot has no {kind}, which an encoder-decoder records")
    weights = snapshot[kind].astype(np.float32)  # (layers, H, queries, keys)
    n_layers, heads, queries, keys = weights.shape
    gap = max(1, max(queries, keys) // 16)
    future = np.triu(np.ones((queries, keys), dtype=bool), 1)
    if kind == "attention" and not weights[..., future].any():
        weights = np.where(future, np.nan, weights)  # the future stays blank
    mosaic = np.pad(weights, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan)
    mosaic = mosaic.transpose(0, 2, 1, 3).reshape(n_layers * (queries + gap), heads * (keys + gap))[:-gap, :-gap]
    left, top = np.arange(heads) * (keys + gap), np.arange(n_layers) * (queries + gap)  # of each map, in pixels

    width, height = 1.15 * heads, 1.15 * n_layers  # inches
    figure = Plot(figsize=(width + 1.7, height + 0.95), dpi=100)
    axes, bar_axes = (
        figure.add_axes((x / (width + 1.7), 0.55 / (height + 0.95), wide / (width + 1.7), height / (height + 0.95)))
        for x, wide in ((0.75, width), (width + 0.85, 0.12))
    )
    image = axes.imshow(mosaic**0.5, cmap="viridis", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_xticks(left + (keys - 1) / 2, [f"head {head}" for head in range(heads)], size=SIZE)
    numbers = layer_numbers(snapshot, n_layers, "layers" if kind == "attention" else f"{kind}_layers")
    axes.set_yticks(top + (queries - 1) / 2, [f"layer {layer}" for layer in numbers], size=SIZE, rotation=90, va="center")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    what = "key" if kind == "attention" else "token of the source"
    axes.set_xlabel(f"{what} s, 0 to {keys - 1} in each map", size=SIZE)
    axes.set_ylabel("query t" if kind != "encoder_attention" else "token t of the source", size=SIZE)
    prompt_len, title = int(snapshot["prompt_len"]), f"step {int(snapshot['step']):,}"
    if kind == "attention" and 1 < prompt_len <= queries:
        for row in top:
            axes.vlines(left + prompt_len - 1, row - 0.5, row + queries - 0.5, color="crimson", linewidth=0.5)
        for column in left:
            axes.hlines(top + prompt_len - 1, column - 0.5, column + keys - 0.5, color="crimson", linewidth=0.5)
        title += "; red lines: the delimiter"
    ticks = np.array([0, 0.1, 0.25, 0.5, 1])
    bar = figure.colorbar(image, cax=bar_axes)
    bar.set_ticks(list(ticks**0.5), labels=[f"{tick:g}" for tick in ticks])
    bar.ax.tick_params(labelsize=SIZE)
    bar.set_label("attention weight", size=SIZE)
    axes.set_title(title, size=SIZE + 1)
    return figure


def learning_curves(histories: Mapping[str, Any], metrics: Sequence[str]) -> Plot:
    """histories: tables of `Run.history()` by label."""
    if not metrics:
        raise ValueError("metrics is empty; name one, such as ce_loss")
    figure = Plot(figsize=(3.6 * len(metrics) + 0.2, 3.0), dpi=100, layout="constrained")
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
        if metric in LOGARITHMIC:
            axes.set_yscale("log")
        else:
            axes.margins(y=0.03)
        axes.tick_params(labelsize=SIZE)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=SIZE - 1.5, frameon=False)
    return figure


def receptive_fields(models: Mapping[str, Any], length: int | None = None) -> Plot:
    """A line for each model; what its convolutions see ends at the dashed one."""
    from lab.analysis.receptive_field import SMALL, by_convolution, length_for, measured

    figure = Plot(figsize=(5.6, 3.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    for i, (name, model) in enumerate(models.items()):
        gradient = measured(model, length or length_for(model))
        gradient = gradient / gradient.max()
        distance = np.arange(1, len(gradient) + 1)
        shown = gradient > 0
        axes.plot(distance[shown], gradient[shown], color=f"C{i}", linewidth=1.2, label=name)
        tokens = by_convolution(model)
        if 1 < tokens <= len(gradient):
            axes.axvline(tokens, color=f"C{i}", linewidth=1, linestyle="--")
            axes.text(
                tokens, 1.01, f"{tokens:,}", color=f"C{i}", size=SIZE - 1, ha="center", va="bottom", transform=axes.get_xaxis_transform()
            )
    axes.axhline(SMALL, color="grey", linewidth=0.7, linestyle=":")
    axes.set(xscale="log", yscale="log")
    axes.set_ylim(bottom=max(1e-7, axes.get_ylim()[0]))
    axes.set_xlabel("tokens back from the last one, itself included", size=SIZE)
    axes.set_ylabel("|gradient| / the largest", size=SIZE)
    axes.tick_params(labelsize=SIZE)
    axes.legend(fontsize=SIZE - 1, frameon=False, loc="lower left")
    return figure


def label(path: RunPath, paths: Sequence[RunPath]) -> str:
    """The shortest end of a path that no other one has."""
    parts = Path(path).parts
    for n in range(1, len(parts)):
        if sum(Path(other).parts[-n:] == parts[-n:] for other in paths) == 1:
            return "/".join(parts[-n:])
    return str(path)


def save(figure: Plot, output: RunPath | None) -> Plot:
    if output is not None:
        figure.savefig(output, dpi=150)
    return figure
