"""Plots of the experts in a run, each a matplotlib Figure (lab/analysis/plots.py), from the snapshots of `callbacks.experts`.

    plot_experts(run, step)      how much each expert of each layer is used, at one step
    plot_expert_history(run)     the same over the steps, a panel for each layer

The middle of the colours is an even share, 1 / E; white is a dead expert, which no token goes to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from lab.analysis.plots import SIZE, Plot, RunPath, layer_numbers, save
from lab.analysis.snapshots import read_snapshot, snapshot_steps
from lab.training.run import RunError

Snapshot = Mapping[str, np.ndarray]
PANELS = 6  # layers in one picture of the history, unless they are named
STEPS = 200  # columns of it
NUMBERS = 128  # cells of a picture that still have room for their shares in percent


def plot_experts(logdir: RunPath, step: int | None = None, output: RunPath | None = None) -> Plot:
    """The usage in the snapshot nearest to `step` (None: the last one)."""
    return save(expert_usage(read_snapshot(logdir, "experts", step)), output)


def plot_expert_history(logdir: RunPath, layers: Sequence[int] | None = None, output: RunPath | None = None) -> Plot:
    """The usage in all snapshots, or 200 of them, evenly spaced. layers: None takes up to six, evenly spaced."""
    read_snapshot(logdir, "experts")  # RunError where there is none
    steps = list(snapshot_steps(logdir, "experts"))
    some = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), STEPS)).round().astype(int))
    return save(expert_history([read_snapshot(logdir, "experts", steps[i]) for i in some], layers), output)


# ----------------------------------------------------------------------- drawing


def expert_usage(snapshot: Snapshot) -> Plot:
    """A row for each layer, a column for each expert, the share of the choices as a colour, and in percent where there is room."""
    usage = snapshot["usage"]  # (layers, E)
    n_layers, E = usage.shape
    width, height = max(2.6, 0.42 * E), max(0.8, 0.36 * n_layers)  # inches
    figure = Plot(figsize=(width + 1.75, height + 1.0), dpi=100)
    box = figure.get_size_inches()
    axes, bar_axes = (
        figure.add_axes((left / box[0], 0.5 / box[1], wide / box[0], height / box[1])) for left, wide in ((0.8, width), (width + 0.9, 0.12))
    )
    image = _shares(axes, usage, E)
    if usage.size <= NUMBERS:
        for (i, e), share in np.ndenumerate(usage):
            colour = "white" if share > 1.2 / E else "black"
            axes.text(e, i, f"{100 * share:.0f}", ha="center", va="center", size=SIZE - 2, color=colour)
    axes.set_yticks(range(n_layers), [f"layer {i}" for i in layer_numbers(snapshot, n_layers)], size=SIZE)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=SIZE, length=0)
    axes.set_xlabel("expert", size=SIZE)
    axes.set_title(f"step {int(snapshot['step']):,}, {int(snapshot['tokens']):,} tokens", size=SIZE + 1)
    _bar(figure, image, bar_axes, E)
    return figure


def expert_history(snapshots: Sequence[Snapshot], layers: Sequence[int] | None = None) -> Plot:
    """Steps to the right, experts downwards."""
    last = snapshots[-1]
    numbers = layer_numbers(last, len(last["usage"]))
    unknown = [layer for layer in layers or () if layer not in numbers]
    if unknown:
        raise RunError(f"layers={list(layers or ())}: the run has experts in the layers {', '.join(map(str, numbers))}")
    evenly = np.linspace(0, len(numbers) - 1, min(len(numbers), PANELS)).round().astype(int)
    shown = [numbers[i] for i in evenly] if layers is None else list(layers)
    E = last["usage"].shape[1]
    steps = [int(snapshot["step"]) for snapshot in snapshots]

    figure = Plot(figsize=(6.4, 0.75 + 1.15 * len(shown)), dpi=100, layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, layer in zip(panels, shown, strict=True):
        image = _shares(axes, np.stack([snapshot["usage"][numbers.index(layer)] for snapshot in snapshots], 1), E)
        axes.set_ylabel(f"layer {layer}\nexpert", size=SIZE)
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.tick_params(labelsize=SIZE)
    places = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 7)).round().astype(int))
    panels[-1].set_xticks(places, [f"{steps[i]:,}" for i in places])
    panels[-1].set_xlabel("optimiser step", size=SIZE)
    _bar(figure, image, figure.colorbar(image, ax=list(panels)).ax, E)
    return figure


def _shares(axes: Axes, shares: np.ndarray, E: int) -> AxesImage:
    """An even share in the middle of the colours, twice as much and more at their end."""
    colours = colormaps["viridis_r"].with_extremes(bad="white")
    return axes.imshow(np.where(shares == 0, np.nan, shares), cmap=colours, vmin=0, vmax=2 / E, aspect="auto", interpolation="nearest")


def _bar(figure: Plot, image: AxesImage, axes: Axes, E: int) -> None:
    bar = figure.colorbar(image, cax=axes, extend="max")
    bar.set_ticks([0, 1 / E, 2 / E], labels=["0", f"1/{E}", f"2/{E}"])
    bar.ax.tick_params(labelsize=SIZE)
    bar.set_label("share of the choices", size=SIZE)
