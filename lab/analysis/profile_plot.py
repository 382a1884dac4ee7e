"""The picture of a profile (lab/analysis/profile.py): time and memory against the length, both logarithmic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from lab.analysis.plots import SIZE, Plot

PANELS = {
    "training_ms": ("training step", "ms"),
    "prefill_ms": ("prefill", "ms"),
    "decoding_ms": ("decoding, one token", "ms"),
    "training_mib": ("memory of training", "MiB"),
    "prefill_mib": ("memory of prefill", "MiB"),
    "state_bytes": ("state", "KiB"),
}


def growth(found: Mapping[str, Any]) -> Plot:
    """A panel for each quantity, a colour for each model: measured points, the fitted line, and the exponent in the legend."""
    figure = Plot(figsize=(10.5, 6.4), dpi=100, layout=ConstrainedLayoutEngine(hspace=0.06))
    lengths = np.array(found["lengths"], dtype=float)
    colours = matplotlib.color_sequences["tab10"]
    for axes, (key, (title, unit)) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for number, model in enumerate(found["models"]):
            values = np.array([np.nan if value is None else value for value in model[key]], dtype=float)
            values = values / 1024 if unit == "KiB" else values
            shown = values > 0
            if not shown.any():
                continue
            colour, marker = colours[number % len(colours)], "osD^vPX*"[number % 8]
            fit = model["exponents"][key]
            label = model["name"]
            if fit is not None:
                half = "" if fit["high"] is None else f" ± {fit['high'] - fit['value']:.2f}"
                label += f"  $L^{{{fit['value']:.2f}}}${half}"
                x, y = np.log(lengths[shown]), np.log(values[shown])
                line = np.exp(y.mean() + fit["value"] * (x - x.mean()))  # a line of least squares goes through the mean
                axes.plot(lengths[shown], line, color=colour, linewidth=1.0, alpha=0.6)
            axes.plot(lengths[shown], values[shown], marker, color=colour, markersize=4.5, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(title, size=SIZE + 1)
        axes.set_ylabel(unit, size=SIZE)
        axes.xaxis.set_major_locator(FixedLocator(list(lengths)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        drawn = [value for line in axes.lines for value in np.asarray(line.get_ydata()).tolist()] or [1.0]
        low, high = min(drawn) / 1.5, max(drawn) * 1.5  # matplotlib's own are singular where all values are equal
        if high / low < 100:  # at most two powers of ten to write down
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axes.set_ylim(low, high * (high / low) ** (0.08 + 0.11 * len(found["models"])))  # room for the legend
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=SIZE - 1)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.has_data():
            axes.legend(fontsize=SIZE - 1, frameon=False, loc="upper left")
    figure.supxlabel("tokens", size=SIZE)
    threads = found["machine"]["threads"]
    figure.suptitle(f"cost by length, one sequence, {threads} thread{'s' if threads > 1 else ''}", size=SIZE + 2)
    return figure
