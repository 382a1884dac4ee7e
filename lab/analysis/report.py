"""One table of any runs: what differs among them, what became of them, their scores. It imports no torch.

The best run is the one with the lowest validation loss; its test scores are reported and take no part in the choice.
"""

from __future__ import annotations

import glob
import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lab.config.identity import relevant
from lab.training.run import Run, RunError

SELECTION = "* marks the lowest validation loss of its task; the test scores took no part in that choice"
SWEEP = "sweep.json"
MONITOR = "val/ce_loss"  # what chooses the best checkpoint of a run, and here the best run


@dataclass(frozen=True)
class Row:
    """One run, or a folder that should have been one."""

    path: Path
    model: str | None = None
    task: str | None = None
    choices: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # by dotted key, without what does not matter to the experiment
    status: str = "no run"
    reason: str | None = None
    step: int | None = None
    params: int | None = None
    val: float | None = None  # the loss of the best checkpoint
    test: dict[str, float] = field(default_factory=dict)
    references: dict[str, float] = field(default_factory=dict)
    code: str | None = None

    @property
    def data(self) -> str:
        """What two runs must have in common for their losses to be comparable."""
        return json.dumps([self.task, {key: value for key, value in self.config.items() if key.startswith("task.")}], sort_keys=True)


# ----------------------------------------------------------------------- reading


def rows(targets: Iterable[str]) -> list[Row]:
    """A row for each run of these runs, sweeps, folders and globs, each once; RunError for a path that does not exist."""
    found: dict[Path, Row] = {}
    for target in targets:
        paths = [Path(target)] if Path(target).exists() else [Path(path) for path in sorted(glob.glob(target, recursive=True))]
        if not paths:
            raise RunError(f"{target}: there is no such run, sweep or folder")
        for path in paths:
            for folder, reason in _runs(path):
                found.setdefault(folder.resolve(), read(folder, reason))
    return list(found.values())


def _runs(path: Path) -> Iterator[tuple[Path, str | None]]:
    """The run folders that a path stands for, each with what its sweep knows of it; the path itself where it stands for none."""
    if path.name == SWEEP or (path.is_file() and path.stem == "table"):
        path = path.parent
    if (path / SWEEP).is_file():
        try:
            jobs = [(Path(job["folder"]), job["reason"]) for job in _json(path / SWEEP)["jobs"]]
        except (RunError, KeyError, TypeError) as error:
            yield path, str(error) if isinstance(error, RunError) else f"{path / SWEEP} is not as lab writes it"
        else:
            yield from jobs
        return
    below = []
    for folder, inner, files in os.walk(path):
        inner.sort()
        if "config.yaml" in files and "hparams.yaml" in files:
            below.append((Path(folder), None))
            inner.clear()
    yield from below or [(path, None)]


def read(path: Path, reason: str | None = None) -> Row:
    """The row of one folder. Whatever is missing or cannot be read is its reason; nothing is raised for it.

    reason: what is known from elsewhere, such as why a job ended before it was a run.
    """
    row = Row(path, status="failed" if reason else "no run", reason=reason or "there is no run in this folder")
    run = Run(path)
    if not path.is_dir() and not reason:
        return replace(row, status="not begun", reason=None) if not path.exists() else replace(row, reason="not a folder")
    if not run.exists():
        return row
    wrong: list[str] = []

    def ask(question: Callable[[], Any]) -> dict[str, Any]:
        """The answer; {} if there is none, or if it is not as lab writes it."""
        try:
            answer = question()
        except FileNotFoundError:
            return {}
        except (RunError, OSError, KeyError, TypeError, ValueError) as error:
            wrong.append(str(error) if isinstance(error, RunError) else f"{path}: {type(error).__name__}: {error}")
            return {}
        if not isinstance(answer, dict):
            wrong.append(f"{path}: one of its files is not as lab writes it")
            return {}
        return answer

    hparams, job, config = ask(run.hparams), ask(run.job), ask(lambda: relevant(run.config()))
    metrics, test = ask(lambda: _json(path / "metrics.json")), ask(lambda: _json(path / "eval" / "test-best.json"))
    choices = ask(lambda: hparams.get("choices", {}))
    scores, references = ask(lambda: test.get("metrics", {})), ask(lambda: test.get("references", {}))
    best = ask(lambda: best_validation(path))
    status = job.get("status", "no run" if wrong else "not begun")
    if status == "running" or (status == "done" and test):  # what the sweep knew is of the past
        reason = None
    said = dict.fromkeys([*wrong, reason or job.get("reason")])
    return Row(
        path,
        model=choices.get("model"),
        task=choices.get("task"),
        choices=choices,
        config=config,
        status=status,
        reason="; ".join(" ".join(str(sentence).split()) for sentence in said if sentence) or None,
        step=max(filter(None, (job.get("step"), last_step(path))), default=None),  # job.json has that of the last stop
        params=metrics.get("params"),
        val=best.get(MONITOR),
        test={name: value for name, value in scores.items() if isinstance(value, int | float)},
        references=references,
        code=hparams.get("code_version"),
    )


def best_validation(path: Path) -> dict[str, Any]:
    """The row of metrics.jsonl that the run's best checkpoint is of: the lowest loss, the first of equals. {} before a validation."""
    best: dict[str, Any] = {}
    with (path / "metrics.jsonl").open() as file:
        for line in file:
            if f'"{MONITOR}"' not in line:
                continue
            try:
                row = json.loads(line)
            except ValueError:  # the last line, cut off by a kill
                break
            if row[MONITOR] is not None and row[MONITOR] < best.get(MONITOR, float("inf")):
                best = row
    return best


def last_step(path: Path) -> int | None:
    """The latest step in the metrics.jsonl of a run that may be at work; None before its first row."""
    with suppress(OSError, ValueError, KeyError), (path / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 10_000))
        return int(json.loads(file.read().rpartition(b"\n")[0].rpartition(b"\n")[2])["step"])  # a row that is being written has no end
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} is not as lab writes it")
    return value


# ----------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Report:
    """A table of plain values, and the sentences that belong under it."""

    columns: list[str]
    rows: list[dict[str, Any]]
    notes: list[str]


def by_run(found: list[Row]) -> Report:
    """A line for each run."""
    differing, best = differences(found), _best(found)
    tests = _names(row.test for row in found)
    several_codes = len({row.code for row in found if row.code}) > 1
    lines = []
    for row in found:
        line: dict[str, Any] = {"run": str(row.path), "model": row.model, "task": row.task}
        line |= {key: _value(row, key) for key in differing}
        line |= {"status": row.status, "step": row.step, "params": row.params, "best": "*" if row in best else "", "val ce_loss": row.val}
        line |= {f"test {name}": row.test.get(name) for name in tests}
        line |= {"code": row.code} if several_codes else {}
        lines.append(line | {"reason": row.reason})
    return _report(lines, found)


def by_seed(found: list[Row]) -> Report:
    """A line for each experiment, over its seeds: how many are done, then mean and sample standard deviation of each score of those."""
    groups: dict[str, list[Row]] = {}
    for row in found:
        same = {key: value for key, value in row.config.items() if key != "seed"}
        groups.setdefault(json.dumps([row.model, row.task, same or str(row.path)], sort_keys=True), []).append(row)
    differing = [key for key in differences(found) if key != "seed"]
    tests = _names(row.test for row in found)
    scores: dict[str, Callable[[Row], float | None]] = {"val ce_loss": lambda row: row.val}
    scores |= {f"test {name}": lambda row, name=name: row.test.get(name) for name in tests}  # type: ignore[misc]
    lines, means = [], []
    for group in groups.values():
        first, done = group[0], [row for row in group if row.status == "done"]
        line: dict[str, Any] = {"model": first.model, "task": first.task} | {key: _value(first, key) for key in differing}
        line |= {"runs": len(group), "n": len(done), "seeds": ", ".join(str(row.config["seed"]) for row in done if "seed" in row.config)}
        line |= {"best": ""}
        for name, score in scores.items():
            values = [value for row in done if (value := score(row)) is not None]
            line[name] = statistics.fmean(values) if values else None
            line[f"{name} sd"] = statistics.stdev(values) if len(values) > 1 else None
        if len({row.code for row in done}) > 1:
            line["code"] = "several versions"
        lines.append(line)
        means.append(replace(first, val=line["val ce_loss"], status="done"))
    for line, mean in zip(lines, means, strict=True):
        line["best"] = "*" if mean in _best(means) else ""
    report = _report(lines, found)
    return replace(report, notes=[*report.notes, "n: the runs that are done, which alone count; sd: sample standard deviation over them"])


def _report(lines: list[dict[str, Any]], found: list[Row]) -> Report:
    columns = _names(lines)
    columns = sorted(columns, key=lambda name: ("code", "reason").index(name) + 1 if name in ("code", "reason") else 0)
    kept = [name for name in columns if any(line.get(name) not in (None, "") for line in lines) or name in ("model", "val ce_loss")]
    notes = [SELECTION]
    counts = Counter(row.code for row in found if row.code)
    if len(counts) > 1:
        notes.append("the runs are of different code: " + ", ".join(f"{code} ({n})" for code, n in counts.most_common()))
    for task, references in {row.task: row.references for row in found if row.references}.items():
        notes.append(f"references of {task}: " + ", ".join(f"{name} {number(value)}" for name, value in references.items()))
    return Report(kept, [{name: line.get(name) for name in kept} for line in lines], notes)


def differences(found: list[Row]) -> list[str]:
    """The keys whose values differ among the rows that have them; what only follows from another model or task is left out."""
    values: dict[str, set[str]] = {}
    of_one_model: dict[tuple[str, Any, Any], set[str]] = {}
    for row in found:
        for key, value in row.config.items():
            if not key.endswith("_target_"):
                values.setdefault(key, set()).add(json.dumps(value))
        for key, option in row.choices.items():
            if key not in ("model", "task", "experiment"):
                of_one_model.setdefault((key, row.model, row.task), set()).add(option)
    chosen = {key for (key, _, _), options in of_one_model.items() if len(options) > 1}
    keys = [*sorted(chosen), *(key for key, seen in values.items() if len(seen) > 1)]
    return sorted(keys, key=lambda key: key == "seed")  # the seed last


def _value(row: Row, key: str) -> Any:
    value = row.choices[key] if key in row.choices else row.config.get(key)
    return json.dumps(value) if isinstance(value, list | dict) else value


def _best(found: list[Row]) -> list[Row]:
    """For each task, of the runs that are done, the one with the lowest validation loss."""
    best: dict[str, Row] = {}
    for row in found:
        if row.status == "done" and row.val is not None:
            kept = best.get(row.data)
            best[row.data] = row if kept is None or row.val < kept.val else kept  # type: ignore[operator]
    return list(best.values())


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """All keys, in the order of their first appearance."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def number(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
