"""Learning curves over the seeds of a comparison: validation scores against steps, tokens and seconds of training. It imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.analysis.statistics import estimate
from lab.files import by_step, read_rows
from lab.training.run import MONITOR

if TYPE_CHECKING:
    from lab.analysis.plots import Plot

AXES = {"step": "optimiser step", "tokens": "tokens trained on", "seconds": "seconds of training steps"}
"""What a score is drawn against. tokens: without padding. seconds: without validations and what is saved after them."""


def validations(folder: Path) -> list[dict[str, Any]]:
    """{step, tokens, seconds, scores {val/NAME: value}} of each validation of a run; tokens and seconds are None of a run of a version
    that did not count them."""
    found = []
    for step, row in by_step(read_rows(folder / "metrics.jsonl")).items():
        if row.get(MONITOR) is not None:
            scores = {name: value for name, value in row.items() if name.startswith("val/") and value is not None}
            found.append({"step": step, "tokens": row.get("train/tokens"), "seconds": row.get("train/seconds"), "scores": scores})
    return found


def curves(runs: Mapping[str, Sequence[Path]], metrics: Iterable[str]) -> list[dict[str, Any]]:
    """{model, metric, x, points [[x, n, mean, low, high], ...]} of each model, validation score and axis. runs: {model: folders}.

    The seeds meet at a step; x is the mean of theirs there.
    """
    found = []
    for model, folders in runs.items():
        histories = [{each["step"]: each for each in validations(folder)} for folder in folders]
        steps = sorted({step for history in histories for step in history})
        for metric in metrics:
            lines: dict[str, list[list[Any]]] = {x: [] for x in AXES}
            for step in steps:
                there = [history[step] for history in histories if step in history and metric in history[step]["scores"]]
                if not there:
                    continue
                n, mean, low, high = estimate([each["scores"][metric] for each in there])
                for x, points in lines.items():
                    if all(each[x] is not None for each in there):
                        points.append([step if x == "step" else statistics.fmean(each[x] for each in there), n, mean, low, high])
            found += [{"model": model, "metric": metric, "x": x, "points": points} for x, points in lines.items() if points]
    return found


def plot_curves(found: Sequence[Mapping[str, Any]], seeds: int) -> Plot:
    """A row of three panels for each score: means over the seeds, and their 95 % intervals as bands. The legend says of how many seeds."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    from lab.analysis.pairs import HIGHER
    from lab.analysis.plots import LOGARITHMIC, SIZE, TITLES, Plot

    metrics, models = (list(dict.fromkeys(line[key] for line in found)) for key in ("metric", "model"))
    figure = Plot(figsize=(10.5, 0.45 + 2.75 * len(metrics)), dpi=100, layout="constrained")
    panels = figure.subplots(len(metrics), len(AXES), squeeze=False, sharey="row")
    for row, metric in zip(panels, metrics, strict=True):
        name = metric.partition("/")[2]
        for axes, (x, label) in zip(row, AXES.items(), strict=True):
            drawn = [line for line in found if line["metric"] == metric and line["x"] == x]
            for line in drawn:
                at, n, mean, low, high = zip(*line["points"], strict=True)
                style = {"color": f"C{models.index(line['model'])}"}
                axes.plot(at, mean, linewidth=1.4, marker="o", markersize=3, **style)
                band = [i for i, end in enumerate(low) if end is not None]
                axes.fill_between(*([of[i] for i in band] for of in (at, low, high)), alpha=0.15, linewidth=0, **style)
            if not drawn:
                axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes, size=SIZE, color="grey")
            axes.set_xlabel(label, size=SIZE)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.tick_params(labelsize=SIZE)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        values = [point[2] for line in found if line["metric"] == metric for point in line["points"]]
        if name in LOGARITHMIC and min(values) > 0:
            row[0].set_yscale("log")
            row[0].set_ylim(bottom=min(values) / 1.5)  # the band of a few seeds may reach zero
        elif name in HIGHER:
            row[0].set_ylim(-0.03, 1.03)
        row[0].set_ylabel(f"validation\n{TITLES.get(name, name.replace('_', ' '))}", size=SIZE)
    handles = []
    for model in models:
        counts = {point[1] for line in found if line["model"] == model for point in line["points"]}
        of = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(*counts)
        (handle,) = panels[0][0].plot([], [], color=f"C{models.index(model)}", linewidth=2)
        handles.append((handle, model if counts == {seeds} else f"{model} ({of} of {seeds} seeds)"))
    figure.legend(*zip(*handles, strict=True), loc="outside upper center", ncols=min(len(models), 5), fontsize=SIZE, frameon=False)
    return figure
