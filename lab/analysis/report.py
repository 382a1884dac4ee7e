"""One table of any runs: what differs among them, what became of them, their scores. It imports no torch.

The best run is the one with the lowest validation loss; its test scores are reported and take no part in the choice.
"""

from __future__ import annotations

import glob
import json
import os
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from lab.config.identity import relevant
from lab.training.run import MONITOR, Run, RunError

SELECTION = "* marks the lowest validation loss among the runs on the same data; the test scores took no part in that choice"
SWEEP = "sweep.json"


@dataclass(frozen=True)
class Row:
    """One run, or a folder that should have been one."""

    path: Path
    words: str | None = None  # of the job in its sweep
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
    test_data: dict[str, Any] = field(default_factory=dict)  # which data, and how much of it was scored in which way
    references: dict[str, float] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)  # scores of others: {name: {value, source}}
    sha256: str | None = None  # of the data, where the config does not say all of it
    code: str | None = None  # "a, b" where the scores are of other code than the beginning
    created: str = ""

    @property
    def data(self) -> str:
        """What two runs must have in common for their losses to be comparable."""
        node = {key: value for key, value in self.config.items() if key.startswith("task.")}
        return json.dumps([self.task, node, self.sha256], sort_keys=True)

    @property
    def experiment(self) -> str:
        """What the runs of several seeds have in common; a folder whose config is not there has nothing in common with any."""
        same = {key: value for key, value in self.config.items() if key != "seed"}
        return json.dumps([self.model, self.task, same or str(self.path)], sort_keys=True)


# ----------------------------------------------------------------------- reading


def rows(targets: Iterable[str]) -> list[Row]:
    """A row for each run of these runs, sweeps, folders and globs, each once; RunError for a path that does not exist."""
    found: dict[Path, Place] = {}
    for target in targets:
        paths = [Path(target)] if Path(target).exists() else [Path(path) for path in sorted(glob.glob(target, recursive=True))]
        if not paths:
            raise RunError(f"{target}: there is no such run, sweep or folder")
        for path in paths:
            for place in _places(path):
                known = found.setdefault(place.path.resolve(), place)
                found[place.path.resolve()] = Place(known.path, known.words or place.words, known.reason or place.reason)
    return [read(*place) for place in found.values()]


class Place(NamedTuple):
    """A folder, and what its sweep knows of the job that has it."""

    path: Path
    words: str | None = None
    reason: str | None = None


def _places(path: Path) -> Iterator[Place]:
    """The run folders that a path stands for, those of the sweeps below it included; the path itself where it stands for none."""
    if path.name == SWEEP or (path.is_file() and path.stem == "table"):
        path = path.parent
    below = []
    for folder, inner, files in os.walk(path):
        inner.sort()
        if SWEEP in files:
            below += _jobs(Path(folder))
            inner.clear()
        elif "config.yaml" in files and "hparams.yaml" in files:
            below.append(Place(Path(folder)))
            inner.clear()
    yield from below or [Place(path)]


def _jobs(sweep: Path) -> list[Place]:
    """The jobs of runs/sweeps/<hash>, wherever this `runs` is seen from: sweep.json has their folders from where the sweep was started."""
    try:
        runs, beyond_links = Path(os.path.normpath(sweep / ".." / "..")), sweep.resolve().parents[1]
        runs = runs if runs.resolve() == beyond_links else beyond_links
        return [
            Place(runs / Path(job["folder"]).relative_to("runs"), shlex.join(job.get("words", [])) or None, job["reason"])
            for job in _json(sweep / SWEEP)["jobs"]
        ]
    except (RunError, LookupError, TypeError, ValueError) as error:
        return [Place(sweep, reason=str(error) if isinstance(error, RunError) else f"{sweep / SWEEP} is not as lab writes it")]


def read(path: Path, words: str | None = None, reason: str | None = None) -> Row:
    """The row of one folder. Whatever is missing or cannot be read is its reason; nothing is raised for it.

    words, reason: what is known from elsewhere, such as why a job ended before it was a run.
    """
    row = Row(path, words, status="failed" if reason else "no run", reason=reason or "there is no run in this folder")
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
    published = ask(lambda: test.get("published", metrics.get("published", {})))
    data, test_data = ask(lambda: metrics.get("data", {})), ask(lambda: test.get("data", {}))
    codes = dict.fromkeys(document["code_version"] for document in (hparams, metrics, test) if document.get("code_version"))
    best = ask(lambda: best_validation(path))
    status = job.get("status", "no run" if wrong else "not begun")
    if status == "running" or (status == "done" and test):  # what the sweep knew is of the past
        reason = None
    said = dict.fromkeys([*wrong, reason or job.get("reason")])
    return Row(
        path,
        words,
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
        test_data=test_data,
        references={name: value for name, value in references.items() if isinstance(value, int | float)},
        published={name: entry for name, entry in published.items() if isinstance(entry, dict) and {"value", "source"} <= entry.keys()},
        sha256=data.get("sha256"),
        code=", ".join(map(str, codes)) or None,
        created=str(hparams.get("created", "")),
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
    with suppress(OSError, ValueError, KeyError, TypeError), (path / "metrics.jsonl").open("rb") as file:
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
    tests, evaluated, codes = _names(row.test for row in found), _differing_evaluations(found), _codes(found)
    lines = []
    for row in found:
        line: dict[str, Any] = {"run": str(row.path), "model": row.model, "task": row.task}
        line |= {key: _value(row, key) for key in differing} | _data([row], found)
        line |= {"status": row.status, "step": row.step, "params": row.params, "best": "*" if row in best else "", "val ce_loss": row.val}
        line |= {f"test {name}": row.test.get(name) for name in tests}
        line |= {f"test {name}": row.test_data.get(name) for name in evaluated}
        line |= {"code": row.code} if len(codes) > 1 else {}
        lines.append(line | {"words": None if row.config else row.words, "reason": row.reason})  # the columns have those of a run
    return _report(lines, found)


def by_seed(found: list[Row]) -> Report:
    """A line for each experiment, over its seeds: how many are done, then mean and sample standard deviation of each score of those."""
    sha256 = {row.experiment: row.sha256 for row in reversed(found) if row.sha256}  # a run without scores goes with the first that has
    groups: dict[tuple[str, str | None], list[Row]] = {}
    for row in found:
        groups.setdefault((row.experiment, row.sha256 or sha256.get(row.experiment)), []).append(row)
    differing = [key for key in differences(found) if key != "seed"]
    tests, evaluated = _names(row.test for row in found), _differing_evaluations(found)
    lines, means, kept, mixed = [], [], [], False
    for rows_of_one in groups.values():
        group = newest(rows_of_one)
        first, done = group[0], [row for row in group if row.status == "done"]
        tested = [row for row in done if row.test]
        alike = len({json.dumps([row.test_data.get(name) for name in evaluated]) for row in tested}) <= 1
        line: dict[str, Any] = {"model": first.model, "task": first.task} | {key: _value(first, key) for key in differing}
        line |= _data(group, found)
        seeds = sorted(row.config["seed"] for row in done if "seed" in row.config)
        line |= {"runs": len(group), "n": len(done), "seeds": ", ".join(map(str, seeds))}
        line |= {"best": ""} | _mean("val ce_loss", [row.val for row in done])
        line |= {"test n": len(tested)} if tests else {}
        for name in tests:
            line |= _mean(f"test {name}", [row.test.get(name) for row in tested] if alike else [])
        for name in evaluated:
            ways = list(dict.fromkeys(row.test_data[name] for row in tested if name in row.test_data))
            line[f"test {name}"] = ways[0] if len(ways) == 1 else ", ".join(map(str, ways))
        mixed |= not alike
        if _several(_codes(done)):
            line["code"] = "several versions"
        lines.append(line | {"words": None if first.config else first.words})
        means.append(replace(first, val=line["val ce_loss"], status="done"))
        kept += group
    for line, mean in zip(lines, means, strict=True):
        line["best"] = "*" if mean in _best(means) else ""
    notes = ["n: the runs that are done, which alone count; sd: sample standard deviation over them"]
    if all(line.get("test n") == line["n"] for line in lines):
        lines = [{name: value for name, value in line.items() if name != "test n"} for line in lines]
    else:
        notes.append("test n: those of them that are evaluated")
    if len(kept) < len(found):
        notes.append(f"left out: {len(found) - len(kept)} of the same experiment and seed in another folder; the newest one counts")
    if mixed:
        notes.append("test scores that were taken in different ways are not averaged")
    report = _report(lines, kept)
    return replace(report, notes=[*report.notes, *notes])


def newest(group: list[Row]) -> list[Row]:
    """Of the runs of one experiment with the same seed the newest that is done, or the newest."""
    kept: dict[Any, Row] = {}
    for row in group:
        seed = str(row.config.get("seed", row.path))
        kept[seed] = max(kept.get(seed, row), row, key=lambda row: (row.status == "done", row.created))
    return list(kept.values())


def _mean(name: str, values: list[float | None]) -> dict[str, float | None]:
    """The two columns of a score, over the runs that have it."""
    there = [value for value in values if value is not None]
    spread = statistics.stdev(there) if len(there) > 1 else None
    return {name: statistics.fmean(there) if there else None, f"{name} sd": spread}


def _data(group: list[Row], found: list[Row]) -> dict[str, str]:
    """The column that tells data apart that the configs do not: the first digits of the SHA-256."""
    if len({row.sha256 for row in found if row.sha256}) < 2:
        return {}
    return {"data": next((row.sha256[:8] for row in group if row.sha256), "")}


def _differing_evaluations(found: list[Row]) -> list[str]:
    """What the test scores differ in beside the model: the context, the stride, ..."""
    names = [name for name in _names(row.test_data for row in found) if name != "sha256"]
    return [name for name in names if len({json.dumps(row.test_data[name]) for row in found if name in row.test_data}) > 1]


def _codes(found: list[Row]) -> dict[str, int]:
    """How many runs are of each code, the most common first; "a, b" is a run of both."""
    return dict(Counter(row.code for row in found if row.code).most_common())


def _several(codes: Mapping[str, int]) -> bool:
    return len(codes) > 1 or any(", " in code for code in codes)


def _report(lines: list[dict[str, Any]], found: list[Row]) -> Report:
    columns, last = _names(lines), ("code", "words", "reason")
    columns = sorted(columns, key=lambda name: last.index(name) + 1 if name in last else 0)
    kept = [name for name in columns if any(line.get(name) not in (None, "") for line in lines) or name in ("model", "val ce_loss")]
    notes, codes = [SELECTION], _codes(found)
    if _several(codes):
        notes.append("the runs are of different code: " + "; ".join(f"{code} ({n})" for code, n in codes.items()))
    for row in found:
        if row.references:
            where = ", ".join([str(row.task), *(f"data {digits}" for digits in _data([row], found).values())])
            notes.append(f"references of {where}: " + ", ".join(f"{name} {number(value)}" for name, value in row.references.items()))
        if row.published:
            scores = (f"{name} {number(entry['value'])} ({entry['source']})" for name, entry in row.published.items())
            notes.append(f"published for {row.task}: {'; '.join(scores)}")
    return Report(kept, [{name: line.get(name) for name in kept} for line in lines], list(dict.fromkeys(notes)))


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
