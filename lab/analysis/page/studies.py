"""The runs that answer one question together: those of a comparison, or those on the same data."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lab.analysis.comparison import FILE, load, summarised
from lab.analysis.curves import curves
from lab.analysis.page.runs import RunView, view
from lab.analysis.pairs import HIGHER, LOWER
from lab.analysis.report import Row, differences, newest, read, rows
from lab.analysis.statistics import METHOD, TEST
from lab.training.run import RunError

MOST_POINTS = 60  # of a learning curve


@dataclass
class Study:
    """What the page says of runs whose scores may be set side by side. `models`: name, and the words of lab-train that make it."""

    title: str
    models: dict[str, list[str]]
    runs: list[RunView]
    metrics: list[str]  # test/NAME or val/NAME, the first one first
    seq_len: int | None
    summary: list[dict[str, Any]]  # as comparison.json has it: mean, low, high by model, metric and length
    curves: list[dict[str, Any]]
    pairs: list[dict[str, Any]] = field(default_factory=list)
    expectations: list[dict[str, Any]] = field(default_factory=list)
    command: str | None = None
    method: str = METHOD
    test: str = TEST

    @property
    def done(self) -> list[RunView]:
        return [run for run in self.runs if run.done and run.counts]

    def of(self, model: str) -> list[RunView]:
        return [run for run in self.done if run.model == model]

    def line(self, model: str, metric: str, length: Any) -> dict[str, Any] | None:
        """The summary of a model's scores."""
        return next((each for each in self.summary if (each["model"], each["metric"], each["length"]) == (model, metric, length)), None)

    def lengths(self, metric: str) -> list[int]:
        return sorted({each["length"] for each in self.summary if each["metric"] == metric and each["length"] is not None})


def lower_is_better(metric: str) -> bool:
    return metric.rpartition("/")[2] in LOWER


def is_share(metric: str) -> bool:
    """Of 0 to 1."""
    return metric.rpartition("/")[2] in HIGHER


def studies(targets: Sequence[str]) -> list[Study]:
    """Of these runs, sweeps, folders, globs and comparisons, in this order: each comparison, then the other runs by their data. RunError
    for a path that does not exist, or that holds nothing."""
    compared = [Path(target) for target in targets if Path(target).name == FILE]
    others = [target for target in targets if Path(target).name != FILE]
    found = rows(others) if others else []
    for target in others:
        for path in [target] if Path(target).exists() else glob.glob(target, recursive=True):
            compared += [Path(folder) / FILE for folder, _, files in os.walk(path) if FILE in files]
    result, seen = [], set()
    for file in dict.fromkeys(path.resolve() for path in compared):
        study, folders = _of_comparison(file)
        result.append(study)
        seen |= folders
    rest = [row for row in found if row.path.resolve() not in seen and not (row.path / FILE).exists()]
    if not result and all(row.status == "no run" for row in rest):
        raise RunError(f"{rest[0].path}: {rest[0].reason}")
    return result + _by_data(rest)


def _of_comparison(file: Path) -> tuple[Study, set[Path]]:
    """The study of a comparison.json, and the folders of its runs, wherever these `runs` are seen from. A run whose folder is not there is
    shown by what the file has of it."""
    found = load(str(file))
    views, folders = [], set()
    for run in found["runs"]:
        folder = file.parents[2] / Path(*Path(run["folder"]).parts[1:])  # the file is in runs/comparisons/NAME
        folder = folder if folder.is_dir() else Path(run["folder"])
        folders.add(folder.resolve())
        row = read(folder, reason=None if run["status"] in ("done", "not begun") else run["reason"])
        if row.status == "done" and run["reason"]:
            row = replace(row, status=run["status"], reason=run["reason"])
        if not folder.is_dir():
            kept = {name: run.get(name) for name in ("status", "reason", "step", "params")}
            row = Row(folder, references=run.get("references") or {}, code=run.get("code_version"), **kept)
        shown = view(row, run["model"], run["seed"], run.get("command"))
        shown.folder = run["folder"]
        if not folder.is_dir():
            shown.seconds, shown.val, shown.test = run.get("seconds"), run.get("val") or {}, run.get("test") or {}
        views.append(shown)
    metrics = list(dict.fromkeys([*found["metrics"], *(line["metric"] for line in found["summary"])]))
    study = Study(
        title=found["name"],
        models=found["models"],
        runs=views,
        metrics=metrics,
        seq_len=found["seq_len"],
        summary=found["summary"],
        curves=found["curves"],
        pairs=found["pairs"],
        expectations=found["expectations"],
        command=found["command"],
        method=found["method"],
        test=found["test"],
    )
    if not study.curves:
        study.curves = _curves(study.models, views, [*study.metrics, "val/ce_loss"])
    return study, folders


def _by_data(found: list[Row]) -> list[Study]:
    """A study for the runs on each data, and one for the folders that are no runs."""
    groups: dict[str, list[Row]] = {}
    for row in found:
        groups.setdefault(row.data if row.config else "", []).append(row)
    if len(groups) == 2 and "" in groups:  # what failed before it was a run is one of the only study that there is
        strays = groups.pop("")
        next(iter(groups.values())).extend(strays)
    several = [rows_of_one for key, rows_of_one in groups.items() if key]
    apart = [key for key in differences([each[0] for each in several]) if key.startswith("task.")]
    return [_of_rows(each, apart) for each in groups.values()]


def _of_rows(found: list[Row], apart: list[str]) -> Study:
    """apart: the keys in which the data of several studies differ."""
    experiments: dict[str, list[Row]] = {}
    for row in found:
        experiments.setdefault(row.experiment if row.config else "", []).append(row)
    named = _labels(found, experiments)
    views: list[RunView] = []
    models: dict[str, list[str]] = {}
    for key, group in experiments.items():
        kept = newest(group)
        for row in group:
            shown = view(row, named[key])
            shown.counts = any(row is each for each in kept)
            views.append(shown)
        if key:
            models[named[key]] = []
    first = next((row for row in found if row.config), found[0])
    values = (f"{key.removeprefix('task.')} {first.config[key]}" for key in apart if key in first.config)
    length = first.config.get("task.seq_len")
    scores = {split: _scores(views, split) for split in ("test", "val")}
    metrics = [f"test/{name}" for name in scores["test"]] or [f"val/{name}" for name in scores["val"]]
    return Study(
        title=", ".join([first.task or "folders that are no runs", *values]),
        models=models,
        runs=views,
        metrics=metrics,
        seq_len=length,
        summary=_summary(models, views, metrics, length),
        curves=_curves(models, views, metrics),
    )


def _labels(found: list[Row], experiments: Mapping[str, list[Row]]) -> dict[str, str]:
    """A short name for each experiment: its model, and what else differs among those of that model."""
    firsts = {key: group[0] for key, group in experiments.items()}
    labels = {}
    for key, row in firsts.items():
        alike = [other for other in firsts.values() if other.model == row.model]
        differing = [name for name in differences(alike) if name != "seed"] if len(alike) > 1 else []
        values = {name: row.choices.get(name, row.config.get(name)) for name in differing}
        said = [f"{name.rpartition('.')[2]}={value}" for name, value in values.items() if value is not None]
        labels[key] = " ".join([row.model or "?", *said])
    for key, label in labels.items():  # two that a word of their own does not tell apart
        if sum(label == other for other in labels.values()) > 1:
            labels[key] = f"{label} ({firsts[key].path.name})"
    return labels


def _scores(views: Iterable[RunView], split: str) -> list[str]:
    """Those of which it is known what is better: the task's own first, ce_loss last; none that only some models have."""
    names: dict[str, None] = {}
    for run in views:
        for scores in [run.val] if split == "val" else run.test.values():
            names |= dict.fromkeys(scores) if isinstance(scores, dict) else {}
    known = [name for name in names if name in (*HIGHER, *LOWER) and name != "loss"]
    return sorted(known, key=lambda name: name == "ce_loss")


def _summary(models: Iterable[str], views: list[RunView], metrics: list[str], seq_len: int | None) -> list[dict[str, Any]]:
    lines = []
    for model in models:
        runs = [run for run in views if run.model == model and run.done and run.counts]
        for metric in metrics:
            split, _, name = metric.partition("/")
            lengths = {str(seq_len): None} if split == "val" else dict.fromkeys(length for run in runs for length in run.test)
            for length in lengths:
                scored = {}
                for run in runs:
                    scores = run.val if split == "val" else run.test.get(length)
                    if isinstance(scores, dict) and isinstance(scores.get(name), int | float):
                        scored[json.dumps(run.seed)] = scores[name]
                if scored:
                    lines.append(summarised(model, metric, int(length) if length.isdecimal() else None, scored))
    return lines


def _curves(models: Iterable[str], views: list[RunView], metrics: Iterable[str]) -> list[dict[str, Any]]:
    """The learning curves of the runs that are done, of a model without any those of the runs that it has."""
    folders: dict[str, list[Path]] = {}
    for model in models:
        runs = [run for run in views if run.model == model and run.counts and run.validated]
        folders[model] = [run.path for run in [run for run in runs if run.done] or runs]
    return curves(folders, dict.fromkeys(f"val/{metric.partition('/')[2]}" for metric in metrics))


def thinned(values: list[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
