"""plot_strata(run): the clocks, phases and memories of a LaminarNet, as a matplotlib Figure.

The phases of its oscillators over the positions; for each stratum the size of its states in one block, each token drawn from the moment it
exists until the next one does; and how long each stratum remembers, in tokens. RunError in one sentence for another model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from lab.analysis.plots import SIZE, Plot, RunPath, save
from lab.training.run import Run, RunError


def plot_strata(logdir: RunPath, length: int = 128, block: int = -1, checkpoint: str = "best", output: RunPath | None = None) -> Plot:
    """Of the first `length` tokens of the run's validation split, in one block."""
    from lab.training.load import load  # imports torch

    model, task, _ = load(Run.open(logdir).path, checkpoint)
    return save(strata(model, task.split("val").batch([0]).inputs[0, :length], block), output)


def strata(model: Any, tokens: Any, block: int = -1) -> Plot:
    """tokens (L,) or, of a model without a vocabulary, floats (L, D)."""
    from lab.models import Laminar, evaluating

    if not isinstance(model, Laminar):
        raise RunError(f"plot_strata draws the strata of a LaminarNet, and the model is a {type(model).__name__}")
    with evaluating(model):
        record = model(tokens[None], want=("record",)).record
    length, ratios = len(tokens), model.ratios
    sizes = [record[f"size.{s}"][block][0].numpy() for s in range(len(ratios))]
    retentions = [record[f"retention.{s}"][block][0].numpy() for s in range(len(ratios))]
    phases = record["phases"][0].numpy() % (2 * np.pi) if "phases" in record else None
    top = phases is not None
    rows = len(ratios) + top + 1
    figure = Plot(figsize=(8.2, 1.25 * rows + 1.1), dpi=100)
    grid = figure.add_gridspec(
        rows, 2, width_ratios=[60, 1], hspace=0.38, wspace=0.03, left=0.1, right=0.91, top=0.95, bottom=0.12,
        height_ratios=[1.2] * top + [1.0] * len(ratios) + [1.2],
    )  # fmt: skip
    if phases is not None:
        _map(figure, grid, 0, phases.T, length, "twilight", (0, 2 * np.pi), "phase (rad)", "oscillator", "phases of the positions")
    for s, (ratio, size) in enumerate(zip(ratios, sizes, strict=True)):
        held = np.full((length, size.shape[1]), np.nan)  # blank until the first window is complete
        for i, token in enumerate(size):
            held[(i + 1) * ratio - 1 : (i + 2) * ratio - 1] = token
        name = f"stratum {s}: |h|, a token for every {ratio}" if ratio > 1 else f"stratum {s}: |h|, every token"
        order = np.argsort(-retentions[s].mean(0)) if len(size) else slice(None)  # those that remember longest on top
        span = (0.0, float(size.max()) if size.size else 1.0)
        axes = _map(figure, grid, s + top, held[:, order].T, length, "viridis", span, "|h|", "channel", name)
        axes.tick_params(labelbottom=s == len(ratios) - 1)
        if s == len(ratios) - 1:
            axes.set_xlabel("token t", size=SIZE)
    _memories(figure.add_subplot(grid[rows - 1, 0]), ratios, retentions)
    box = figure.axes[-1].get_position()
    figure.axes[-1].set_position((box.x0, box.y0 - 0.03, box.width, box.height - 0.02))  # below the label of the tokens
    return figure


def _map(
    figure: Plot, grid: Any, row: int, values: np.ndarray, length: int, colours: str, span: tuple[float, float], of: str, y: str, title: str
) -> Any:
    axes = figure.add_subplot(grid[row, 0])
    extent = (-0.5, length - 0.5, len(values) - 0.5, -0.5)
    image = axes.imshow(values, cmap=colours, vmin=span[0], vmax=span[1], aspect="auto", interpolation="nearest", extent=extent)
    bar = figure.colorbar(image, cax=figure.add_subplot(grid[row, 1]))
    bar.set_label(of, size=SIZE - 1)
    bar.ax.tick_params(labelsize=SIZE - 1)
    if colours == "twilight":
        bar.set_ticks([0, np.pi, 2 * np.pi], labels=["0", "π", "2π"])
    axes.set_title(title, size=SIZE, loc="left", pad=3)
    axes.set_ylabel(y, size=SIZE)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=SIZE - 1, labelbottom=False)
    return axes


def _memories(axes: Any, ratios: Sequence[int], retentions: Sequence[np.ndarray]) -> None:
    """The half-lives of the channels, ratio ln 2 / -ln |a|, as shares of the channels that remember at least so long."""
    for s, (ratio, retention) in enumerate(zip(ratios, retentions, strict=True)):
        if retention.size:
            memory = np.sort(ratio * np.log(2) / -np.log(np.clip(retention, 1e-12, 1 - 1e-7)), axis=None)
            axes.plot(memory, 1 - np.arange(len(memory)) / len(memory), color=f"C{s}", linewidth=1.3, label=f"stratum {s}")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("half-life (tokens)", size=SIZE)
    axes.set_ylabel("share of\nchannels", size=SIZE)
    axes.legend(fontsize=SIZE - 1, frameon=False)
    axes.tick_params(labelsize=SIZE - 1)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
