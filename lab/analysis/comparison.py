"""comparison.json, of what the runs of a comparison left in their folders, and its tables. It imports no torch."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab.analysis.curves import curves
from lab.analysis.expectations import Expectation, judge, lacking
from lab.analysis.pairs import pairs
from lab.analysis.report import Report, best_validation, number, read
from lab.analysis.statistics import METHOD, TEST, Estimate, estimate, fewest_seeds, in_figures
from lab.files import unlike
from lab.training.provenance import now
from lab.training.run import Run, RunError

FILE = "comparison.json"
OTHER_DATA = "other data"  # the status of a run that is done, but not comparable


@dataclass(frozen=True)
class Comparison:
    """What a file and the words of the command ask for, checked (lab/sweeps/comparison_words.py)."""

    name: str
    words: list[str]  # all of the command, for the record
    shared: list[str]  # those of lab-train that all runs have
    models: dict[str, list[str]]
    seeds: list[int]
    pairs: list[tuple[str, str]]  # of which it is asked whether they differ
    expectations: list[Expectation]
    lengths: list[int]  # of the inputs that lab-eval scores
    metrics: list[str]  # that its tables show
    seq_len: int
    n_jobs: int = 1
    threads: int | None = None

    @property
    def too_few(self) -> str | None:
        """Why no difference can be significant, whatever comes of the runs."""
        tests, n = len(self.pairs), len(self.seeds)
        if not tests:
            return None if len(self.models) == 1 else "no two of these models are asked about; pairs=NAME compares the others with it"
        needed = fewest_seeds(tests)
        if needed is not None and n >= needed:
            return None
        of = f"no difference of {tests} pairs" if tests > 1 else "no difference"
        takes = f"it takes {needed}" if needed else "nor with more"
        fewer = "; with fewer pairs, as of pairs=NAME, fewer will do" if tests > 1 else ""
        return f"with {n} seed{'s' * (n > 1)} {of} can be significant, {takes}{fewer}"


def document(comparison: Comparison, runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """runs: {model, seed, words, folder, reason} of each; reason is why its process failed."""
    found = [_run(run, comparison) for run in runs]
    _set_apart(found)
    lengths = {"val": [comparison.seq_len], "test": comparison.lengths}
    summary, compared = [], []
    for metric in comparison.metrics:
        for length in lengths[metric.partition("/")[0]]:
            scores = {model: _values(found, model, metric, length) for model in comparison.models}
            summary += [summarised(model, metric, length, values) for model, values in scores.items() if values]
            compared += pairs(scores, comparison.pairs, metric, length, len(comparison.seeds))
    validated = dict.fromkeys(f"val/{name.partition('/')[2]}" for name in (*comparison.metrics, "val/ce_loss"))
    done = [run for run in found if run["status"] == "done"]
    folders = {model: [Path(run["folder"]) for run in done if run["model"] == model] for model in comparison.models}
    return {
        "name": comparison.name,
        "command": shlex.join(["lab-compare", *comparison.words]),
        "written": now(),
        "method": METHOD,
        "test": TEST,
        "models": comparison.models,
        "seeds": comparison.seeds,
        "seq_len": comparison.seq_len,
        "metrics": comparison.metrics,
        "runs": found,
        "summary": summary,
        "planned": comparison.pairs,
        "pairs": compared,
        "curves": curves(folders, validated),
        "expectations": [_judged(expectation, comparison, found) for expectation in comparison.expectations],
    }


def summarised(model: str, metric: str, length: int | None, scores: Mapping[Any, float]) -> dict[str, Any]:
    """A line of "summary": the scores of a model, by seed, and what they say."""
    line = {"model": model, "metric": metric, "length": length, "seeds": list(scores), "values": list(scores.values())}
    return line | estimate(list(scores.values()))._asdict()


def _run(run: Mapping[str, Any], comparison: Comparison) -> dict[str, Any]:
    """One run as its folder says. Scores are those of the best checkpoint by validation: `val` of itself, `test` by length."""
    row, folder = read(run["folder"], reason=run["reason"]), Path(run["folder"])
    val: dict[str, Any] = {}
    with suppress(OSError):
        val = {name.removeprefix("val/"): value for name, value in best_validation(folder).items() if name.startswith("val/")}
    by_length: dict[str, Any] = {}
    if row.status == "done" and row.test:
        by_length = json.loads((folder / "eval" / "test-best.json").read_text()).get("by_length") or {str(comparison.seq_len): row.test}
    not_scored = {str(length) for length in comparison.lengths} - set(by_length)  # by a second lab-eval, perhaps, that failed
    return {
        "model": run["model"],
        "seed": run["seed"],
        "folder": str(folder),
        "command": shlex.join(["lab-train", *run["words"]]),
        "status": row.status,
        "reason": row.reason or (run["reason"] if not_scored else None),
        "step": row.step,
        "params": row.params,
        "seconds": _seconds(folder),
        "code_version": row.code,
        "created": row.created,
        "data": row.sha256,
        "references": row.references,
        "val": val,
        "test": by_length,
    }


def _set_apart(runs: list[dict[str, Any]]) -> None:
    """A score is only set beside others of the same data: that of the newest run. Other data may lie behind an unchanged config, as of
    `task=stdlib` with another Python."""
    scored = [run for run in runs if run["status"] == "done" and run["data"]]
    newest = max(scored, key=lambda run: run["created"], default=None)
    for run in scored:
        if newest is not None and run["data"] != newest["data"]:
            why = f"its data are {run['data'][:8]}, and {newest['data'][:8]} in the newest run; fresh=true runs all of them again"
            run |= {"status": OTHER_DATA, "reason": why}


def _seconds(folder: Path) -> float | None:
    with suppress(RunError):
        return Run(folder).job().get("seconds")
    return None


def _values(runs: Iterable[Mapping[str, Any]], model: str, metric: str, length: int) -> dict[int, float]:
    """The score of each seed of a model, of the runs that are done and have it."""
    split, _, name = metric.partition("/")
    found = {}
    for run in runs:
        scores = run[split] if split == "val" else run[split].get(str(length), {})
        if run["model"] == model and run["status"] == "done" and isinstance(scores, dict) and scores.get(name) is not None:
            found[run["seed"]] = scores[name]
    return found


def _judged(expectation: Expectation, comparison: Comparison, runs: list[dict[str, Any]]) -> dict[str, Any]:
    length = expectation.input_length(comparison.seq_len)
    names = [name for name in (expectation.model, expectation.over) if name]
    scores = {name: _values(runs, name, expectation.metric, length) for name in names}
    missing = {name: _missing(name, expectation, length, runs, comparison) for name in names}
    verdict, found, why = judge(expectation, scores, missing)
    given = {name: value for name, value in asdict(expectation).items() if value is not None} | {"length": length}
    estimated = (found or Estimate(0, float("nan"), None, None))._asdict()
    return given | {"text": str(expectation)} | estimated | {"values": scores, "verdict": verdict, "why": why}


def _missing(model: str, expectation: Expectation, length: int, runs: list[dict[str, Any]], comparison: Comparison) -> dict[int, str]:
    """Why the seeds of a model that lack the score do."""
    if model not in comparison.models:
        return dict.fromkeys(comparison.seeds, "it is left out")
    there = _values(runs, model, expectation.metric, length)
    return {run["seed"]: _why_missing(run, expectation, length) for run in runs if run["model"] == model and run["seed"] not in there}


def _why_missing(run: Mapping[str, Any], expectation: Expectation, length: int) -> str:
    if run["status"] != "done":
        return _not_done(run)
    scores = run["val"] if expectation.split == "val" else run["test"].get(str(length), {})
    if isinstance(scores, str):
        return scores
    if expectation.name in scores:
        return "not a finite number"
    return f"not scored: {run['reason']}" if run["reason"] and not scores else "not scored"


def _not_done(run: Mapping[str, Any]) -> str:
    if run["status"] == "not begun":
        return "not run yet"
    return f"{run['status']}: {run['reason']}" if run["reason"] else str(run["status"])


# ----------------------------------------------------------------------- tables


def load(folder: str) -> dict[str, Any]:
    """The comparison.json of a folder, or that file itself; RunError where there is none."""
    path = Path(folder)
    path = path / FILE if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{path}: there is no such file; lab-compare FILE writes it") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not valid JSON: {error}") from error
    types = {"runs": list, "summary": list, "expectations": list, "models": dict, "metrics": list, "method": str, "seq_len": int}
    types |= {"planned": list, "pairs": list, "curves": list, "seeds": list, "test": str, "name": str, "command": str}
    if wrong := unlike(found, types) or (not found["runs"] and "it has no runs"):
        raise RunError(f"{path} is not a comparison of lab: {wrong}")
    return dict(found)


def tables(found: Mapping[str, Any]) -> list[Report]:
    """The runs, the models, each two of them, and what was expected of them."""
    more = [_of_pairs(found)] if found["pairs"] else []
    return [_of_runs(found), _of_models(found), *more, *([_of_expectations(found)] if found["expectations"] else [])]


def unmet(found: Mapping[str, Any]) -> list[str]:
    """The expectations that did not hold, or of which that cannot be told, as texts."""
    return [f"{each['text']} ({each['verdict']})" for each in found["expectations"] if each["verdict"] != "held"]


def _interval(line: Mapping[str, Any], of: str = "mean") -> str:
    """The mean alone where there is no interval."""
    if not line["n"]:
        return ""
    return f"{line[of]:.3f} (n 1)" if line["low"] is None else in_figures(line[of], line["low"], line["high"])


def _of_runs(found: Mapping[str, Any]) -> Report:
    rows = []
    for run in found["runs"]:
        row = {"model": run["model"], "seed": run["seed"], "status": run["status"], "step": run["step"], "seconds": run["seconds"]}
        row |= {"val ce_loss": run["val"].get("ce_loss")}
        for metric in found["metrics"]:
            split, _, name = metric.partition("/")
            scores = run["val"] if split == "val" else run["test"].get(str(found["seq_len"]), {})
            row[f"{split} {name}"] = scores.get(name)
        rows.append(row | {"reason": run["reason"]})
    columns = [name for name in rows[0] if name != "reason" or any(row["reason"] for row in rows)]
    return Report(columns, rows, [])


def _of_models(found: Mapping[str, Any]) -> Report:
    summary = found["summary"]
    places = list(dict.fromkeys((metric, line["length"]) for metric in found["metrics"] for line in summary if line["metric"] == metric))
    several = {metric for metric, length in places if length != found["seq_len"]}
    rows = []
    for model in found["models"]:
        done = [run for run in found["runs"] if run["model"] == model and run["status"] == "done"]
        seconds = [run["seconds"] for run in done if run["seconds"] is not None]
        row: dict[str, Any] = {"model": model, "params": done[0]["params"] if done else None}
        row["n"] = f"{len(done)} of {len(found['seeds'])}" if len(done) < len(found["seeds"]) else len(done)
        row["seconds a run"] = round(sum(seconds) / len(seconds)) if seconds else None
        lines = {(line["metric"], line["length"]): line for line in summary if line["model"] == model}
        for metric, length in places:
            line = lines.get((metric, length))
            cell = _interval(line) if line else next(
                (run["test"][str(length)].partition(" (")[0] for run in done if isinstance(run["test"].get(str(length)), str)), ""
            )  # fmt: skip
            few = f"; {line['n']} of {len(found['seeds'])} seeds" if line and line["n"] < len(found["seeds"]) else ""
            row[f"{metric} at {length}" if metric in several else metric] = cell + few
        rows.append(row)
    references = {f"{name} {number(value)}" for run in found["runs"] for name, value in run["references"].items()}
    notes = [found["method"] + "; scores of the checkpoint that validation chose; seconds of training"]
    missing = [run for run in found["runs"] if run["status"] != "done"]
    without = {model: {run["seed"]: _not_done(run) for run in missing if run["model"] == model} for model in found["models"]}
    notes += [f"without {lacking(model, seeds, len(seeds) < len(found['seeds']))}" for model, seeds in without.items() if seeds]
    codes = Counter(run["code_version"] for run in found["runs"] if run["status"] == "done" and run["code_version"])
    if len(codes) > 1:
        kinds = ", ".join(f"{code} ({n})" for code, n in codes.items())
        notes.append(f"the runs are of different code: {kinds}; fresh=true runs all of them again")
    notes += [f"without a model: {', '.join(sorted(references))}"] if references else []
    return Report(list(rows[0]), rows, notes)


def _of_pairs(found: Mapping[str, Any]) -> Report:
    places = {metric: {line["length"] for line in found["pairs"] if line["metric"] == metric} for metric in found["metrics"]}
    rows = []
    for line in found["pairs"]:
        metric = line["metric"] if places[line["metric"]] <= {found["seq_len"]} else f"{line['metric']} at {line['length']}"
        numbers = {name: "" if line[name] is None else f"{line[name]:.3g}" for name in ("p", "p_holm", "effect")}
        row = {"score": metric, "a": line["a"], "b": line["b"], "a - b": _interval(line, "difference"), "n": line["n"], "p": numbers["p"]}
        rows.append(row | {"p by Holm": numbers["p_holm"], "effect": numbers["effect"], "in words": line["text"]})
    together = {(line["a"], line["b"]) for line in found["pairs"]}
    apart = [f"{a} and {b}" for a, b in found["planned"] if (a, b) not in together]
    return Report(list(rows[0]), rows, [found["test"], *([f"no seed in common: {', '.join(apart)}"] if apart else [])])


def _of_expectations(found: Mapping[str, Any]) -> Report:
    rows = [
        {"claim": each.get("claim") or "", "expected": each["text"], "found": _interval(each), "n": each["n"], "verdict": each["verdict"]}
        | {"why": each["why"] or "", "source": each["source"]}
        for each in found["expectations"]
    ]
    columns = [name for name in rows[0] if name not in ("claim", "why") or any(row[name] for row in rows)]
    return Report(columns, rows, ["held: all of the interval is within the bound; not held: all of it is beyond; of all seeds"])
