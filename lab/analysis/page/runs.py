"""What the folder of one run says, as the page shows it. Whatever is missing stays empty; nothing is raised for it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from lab.analysis.curves import validations
from lab.analysis.report import Row, best_validation
from lab.files import read_rows
from lab.training.run import Run, RunError

ELSEWHERE = ("run_dir", "resume", "fresh")  # words of a command that say where, not what
SPEED = "train/tokens_per_second"


@dataclass
class RunView:
    """One run. `counts`: it is the one of its model and seed that the means are over."""

    model: str
    seed: Any
    path: Path
    folder: str  # as it is shown
    status: str
    reason: str | None = None
    command: str | None = None
    step: int | None = None
    params: int | None = None
    seconds: float | None = None
    speed: float | None = None  # tokens a second in training, the median of its logs
    cost: dict[str, Any] = field(default_factory=dict)  # flops_per_token, state_bytes
    val: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)  # by length: scores, or why there are none
    tables: dict[str, Any] = field(default_factory=dict)  # by_position, by_distance, ...
    references: dict[str, float] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)
    backends: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    code: str | None = None
    commit: str | None = None
    created: str = ""
    resumed: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    validated: bool = False
    counts: bool = True

    @property
    def done(self) -> bool:
        return self.status == "done"


def view(row: Row, model: str, seed: Any = None, command: str | None = None) -> RunView:
    """row: as lab.analysis.report reads a folder. model: its name on the page. command: instead of the folder's own."""
    run, config = Run(row.path), {}
    hparams, job = _ask(run.hparams), _ask(run.job)
    with suppress(RunError, OSError):
        config = run.config()
    metrics, test = _json(row.path / "metrics.json"), _json(row.path / "eval" / "test-best.json")
    best: Mapping[str, Any] = {}
    with suppress(OSError, TypeError, KeyError):
        best = best_validation(row.path)
    latest = test or metrics
    rows = _rows(row.path / "metrics.jsonl")
    speeds = [value for each in rows if (value := _number(each.get(SPEED)))]
    seq_len = _dict(config.get("task")).get("seq_len")
    own = _dict(test.get("by_length")) or ({str(seq_len): row.test} if row.test else {})
    env = _dict(latest.get("env")) or _dict(hparams.get("env"))
    if job.get("host"):
        env = env | {"host": job["host"]}
    commit = hparams.get("git_commit")
    return RunView(
        model=model,
        seed=config.get("seed") if seed is None else seed,
        path=row.path,
        folder=str(row.path),
        status=row.status,
        reason=row.reason,
        command=command or (plain(str(hparams["command"])) if hparams.get("command") else row.words and f"lab-train {row.words}"),
        step=row.step,
        params=row.params,
        seconds=_number(job.get("seconds")),
        speed=median(speeds) if speeds else None,
        cost=_dict(test.get("cost")) or _dict(metrics.get("cost")),
        val={name.removeprefix("val/"): value for name, value in best.items() if name.startswith("val/")},
        test=own if row.status == "done" else {},
        tables={name: value for name, value in test.items() if name.startswith("by_") and name != "by_length" and value},
        references=row.references,
        published=row.published,
        backends=_dict(latest.get("backends")),
        env=env,
        code=row.code,
        commit=f"{str(commit)[:10]}{', with changes' if hparams.get('git_dirty') else ''}" if commit else None,
        created=row.created,
        resumed=[f"at {each.get('at')} with {shlex.join(map(str, each.get('with') or [])) or 'nothing else'}" for each in _list(hparams)],
        config=config,
        validated=_validated(row.path),
    )


def plain(command: str) -> str:
    """A command without the words that name its folder: again, it begins a run of its own."""
    with suppress(ValueError):
        return shlex.join(word for word in shlex.split(command) if word.partition("=")[0] not in ELSEWHERE)
    return command


def _validated(folder: Path) -> bool:
    """Whether it has learning curves."""
    try:
        return bool(validations(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _ask(question: Any) -> dict[str, Any]:
    try:
        return _dict(question())
    except (RunError, OSError, ValueError):
        return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        return _dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [row for row in read_rows(path) if isinstance(row, dict) and isinstance(row.get("step"), int)]
    except (OSError, ValueError):
        return []


def _list(hparams: Mapping[str, Any]) -> list[dict[str, Any]]:
    resumed = hparams.get("resumed")
    return [each for each in resumed if isinstance(each, dict)] if isinstance(resumed, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
