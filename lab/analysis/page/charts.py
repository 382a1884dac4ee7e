"""The charts of a study: which there are, and what is on them. Every one of them says its numbers in tooltips, and in words for readers who
do not see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

from lab.analysis.curves import AXES
from lab.analysis.page.studies import MOST_POINTS, Study, is_share, lower_is_better, thinned
from lab.analysis.page.svg import Axis, Point, Series, chart
from lab.analysis.report import number
from lab.analysis.statistics import estimate, in_figures

DECADE = 8.0  # the ratio of values from which on their axis is logarithmic


class Panel(NamedTuple):
    title: str
    picture: Element


class View(NamedTuple):
    """Panels that are shown together; a figure shows one of its views at a time."""

    name: str
    panels: list[Panel]


def said(mean: float, low: float | None, high: float | None, n: int) -> str:
    """0.981 [0.950, 1.010], n 3"""
    return f"{number(float(mean)) if low is None or high is None else in_figures(mean, low, high)}, n {n}"


def learning(study: Study) -> list[View]:
    """The validation scores against steps, tokens and seconds."""
    names = list(dict.fromkeys(curve["metric"] for curve in study.curves))
    views = []
    for axis, label in AXES.items():
        panels = []
        for name in names:
            curves = {each["model"]: each["points"] for each in study.curves if each["metric"] == name and each["x"] == axis}
            series = _series(
                study,
                lambda model, curves=curves, name=name, axis=axis: [  # type: ignore[misc]
                    Point(x, mean, low, high, f"{model}, {short_of(axis, x)}: {name} {said(mean, low, high, n)}")
                    for x, n, mean, low, high in thinned(curves.get(model) or [], MOST_POINTS)
                    if mean is not None
                ],
            )
            if series:
                x = Axis(label, include=[0])
                panels.append(
                    Panel(name.replace("/", " "), chart(series, x, _score_axis(name, series), _alt(f"{name} against {axis}", series)))
                )
        if panels:
            views.append(View(label, panels))
    return views


def short_of(axis: str, x: float) -> str:
    return f"{x:,.0f} {axis}" if axis == "tokens" else f"{x:,.1f} seconds" if axis == "seconds" else f"step {x:,.0f}"


def by_length(study: Study) -> list[Panel]:
    """A panel for each score that there is of several lengths."""
    panels = []
    for metric in study.metrics:
        lengths = study.lengths(metric)
        if len(lengths) < 2:
            continue
        series = _series(
            study,
            lambda model, metric=metric, lengths=lengths: [  # type: ignore[misc]
                Point(n, line["mean"], line["low"], line["high"], f"{model}, length {n:,}: {_said(line)}")
                for n in lengths
                if (line := study.line(model, metric, n))
            ],
        )
        x = Axis("length of the input", _scale(lengths), ticks={float(n): f"{n:,}" for n in lengths})
        title = metric.replace("/", " ")
        references = _references(study, metric)
        panels.append(
            Panel(title, chart(series, x, _score_axis(metric, series), _alt(f"{title} by length", series), references=references))
        )
    return panels


def by_table(study: Study) -> list[Panel]:
    """Accuracy by position, and by what else the evaluation told apart: by distance, by the number of pairs, ..."""
    panels = []
    for name in dict.fromkeys(name for run in study.done for name in run.tables):
        of_runs: dict[str, list[dict[str, float]]] = {}
        for run in study.done:
            of_runs.setdefault(run.model, []).append(_cells(run.tables.get(name)))
        keys = list(dict.fromkeys(key for tables in of_runs.values() for table in tables for key in table))
        if len(keys) < 2:
            continue
        at = {key: float(key) if name == "by_position" else float(i) for i, key in enumerate(sorted(keys, key=_first_number))}
        what = name.removeprefix("by_").replace("_", " ")
        shown = thinned(list(at), MOST_POINTS) if name == "by_position" else list(at)
        series = _series(
            study,
            lambda model, of_runs=of_runs, at=at, shown=shown, what=what: [  # type: ignore[misc]
                Point(
                    at[key], found.mean, found.low, found.high, f"{model}, {what} {key}: {said(found.mean, found.low, found.high, found.n)}"
                )
                for key in shown
                if (values := [table[key] for table in of_runs.get(model, []) if key in table])
                for found in [estimate(values)]
            ],
        )
        x = Axis(
            {"position": "position of the target"}.get(what, what), ticks=None if name == "by_position" else {at[key]: key for key in at}
        )
        alt = _alt(f"accuracy by {what}", series)
        panels.append(Panel(f"accuracy by {what}", chart(series, x, _score_axis("accuracy", series), alt)))
    return panels


def costs(study: Study) -> list[View]:
    """The first score, at the length of training and at the longest, against what a model costs."""
    if not study.metrics:
        return []
    metric = study.metrics[0]
    lengths = study.lengths(metric)
    ends: list[int | None] = [n for n in dict.fromkeys([study.seq_len, *lengths[-1:]]) if n in lengths] or [None]
    views = []
    for name, label, cost in COSTS:
        panels = []
        for length in ends:
            series = _series(study, lambda model, cost=cost, length=length: _scored(study, model, metric, length, cost))  # type: ignore[misc]
            if not series:
                continue
            places = [point.x for each in series for point in each.points]
            title = metric.replace("/", " ") + (f" at length {length:,}" if length is not None else "")
            alt = _alt(f"{title} against {label}", series)
            panels.append(Panel(title, chart(series, Axis(label, _scale(places)), _score_axis(metric, series), alt, lines=False)))
        if panels:
            views.append(View(name, panels))
    return views


def mean_cost(study: Study, model: str, cost: Callable[[Any], float | None]) -> float | None:
    """Over the runs of a model that are done."""
    values = [value for run in study.of(model) if (value := cost(run)) is not None]
    return sum(values) / len(values) if values else None


def state_bytes(run: Any) -> float | None:
    """After the shortest length that it was counted for, that of training."""
    known = {int(length): size for length, size in (run.cost.get("state_bytes") or {}).items() if size is not None}
    return known[min(known)] if known else None


COSTS: tuple[tuple[str, str, Callable[[Any], float | None]], ...] = (
    ("parameters", "parameters", lambda run: run.params),
    ("FLOPs", "FLOPs of a token, forward", lambda run: run.cost.get("flops_per_token")),
    ("state", "bytes of state of a sequence", state_bytes),
    ("seconds", "seconds of training", lambda run: run.seconds),
)


def _scored(study: Study, model: str, metric: str, length: Any, cost: Callable[[Any], float | None]) -> list[Point]:
    line, paid = study.line(model, metric, length), mean_cost(study, model, cost)
    if line is None or not paid:
        return []
    return [Point(paid, line["mean"], line["low"], line["high"], f"{model}, {number(round(paid) if paid > 100 else paid)}: {_said(line)}")]


def _series(study: Study, points: Callable[[str], Iterable[Point]]) -> list[Series]:
    """Those of the models that have points; a model has its colour wherever it is shown."""
    found = [Series(model, index, list(points(model))) for index, model in enumerate(study.models)]
    return [each for each in found if each.points]


def _said(line: Mapping[str, Any]) -> str:
    return said(line["mean"], line["low"], line["high"], line["n"])


def _score_axis(metric: str, series: Sequence[Series]) -> Axis:
    """Of a share all of 0 to 1, unless the values are close together; of a loss logarithmic where they are not."""
    values = [point.y for each in series for point in each.points]
    if is_share(metric):
        return Axis("", low=0, high=1, include=[0, 1] if max(values) - min(values) > 0.4 else [])
    if lower_is_better(metric) and min(values) > 0 and max(values) / min(values) > DECADE:
        return Axis("", "log")
    return Axis("")


def _scale(values: Sequence[float]) -> Any:
    return "log" if min(values) > 0 and max(values) / min(values) >= DECADE else "linear"


def _references(study: Study, metric: str) -> list[tuple[str, float]]:
    """What is reached without a model; it is in units of the task's first score."""
    names = [name for run in study.runs for scores in run.test.values() if isinstance(scores, dict) for name in scores if name != "ce_loss"]
    if not names or metric != f"test/{names[0]}":
        return []
    found = {name: value for run in study.runs for name, value in run.references.items()}
    return sorted(found.items(), key=lambda item: item[1])[-1:]


def _cells(table: Any) -> dict[str, float]:
    items = enumerate(table) if isinstance(table, list) else table.items() if isinstance(table, dict) else ()
    return {str(key): float(value) for key, value in items if isinstance(value, int | float) and math.isfinite(value)}


def _first_number(key: str) -> float:
    digits = key.partition("-")[0]
    return float(digits) if digits.isdecimal() else math.inf


def _alt(what: str, series: Sequence[Series]) -> str:
    """In words, for who does not see it: from where to where each line goes."""
    ends = [
        f"{each.label} {number(each.points[0].y)}" + (f" to {number(each.points[-1].y)}" if len(each.points) > 1 else "") for each in series
    ]
    return f"{what}: {'; '.join(ends)}"
