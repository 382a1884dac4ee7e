"""One job of a sweep: a run whose folder follows from its config, the commands that are still to be done, and what became of them."""

from __future__ import annotations

import json
import re
import shlex
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.analysis.report import best_validation, read
from lab.config import Composed, first_difference
from lab.config.overrides import quote
from lab.config.tree import places
from lab.training.run import BUSY, LOG, Run, RunError, job_path

TRAIN, EVAL = "lab.cli.train", "lab.cli.eval"


@dataclass(frozen=True)
class Job:
    """A plain lab-train: the words that all jobs of the sweep share, then those of this one."""

    shared: list[str]
    own: list[str]
    composed: Composed

    @property
    def path(self) -> Path:
        return job_path(self.composed)

    @property
    def label(self) -> str:
        return shlex.join(self.own) or str(self.path)

    @property
    def log(self) -> Path:
        """Where its commands print."""
        return self.path / LOG

    def next_command(self, after: str | None = None, met: bool = False) -> list[str] | None:
        """What is still to be done, in a process of its own; None if nothing is.

        after: the command that has just ended well. met: another process was at it; what that one finished is fresh.
        """
        run = Run(self.path)
        fresh = after is None and not met and bool(self.composed.config["fresh"])
        if after is None and (fresh or not self._is_done(run)):
            plain = re.fullmatch(r"[\w./-]+", str(self.path))
            return [TRAIN, *self.shared, *self.own, f"run_dir={self.path if plain else quote(str(self.path))}"]
        return None if after == EVAL or self._is_evaluated() else [EVAL, str(self.path), *self._lengths(), *self._trust()]

    def _is_done(self, run: Run) -> bool:
        try:
            return run.exists() and run.job().get("status") == "done" and first_difference(self.composed.stored, run.config()) is None
        except RunError:  # lab-train will say what is wrong
            return False

    def _is_evaluated(self) -> bool:
        """Whether the test scores of the best checkpoint are there, or there is nothing to score."""
        task = self.composed.config["task"]
        if task.get("test", self) is None:  # task=dataset without a test split
            return True
        try:
            scores = self._scores()
            stride = scores.get("data", {}).get("stride")  # lab-eval may have been told another than the config's
            as_configured = stride is None or stride == (task.get("eval_stride") or task["seq_len"])
            longer = {str(task["seq_len"] * scale) for scale in task.get("eval_lengths") or () if scale != 1}
            as_configured &= longer <= set(scores.get("by_length", ()))
            return bool(scores["step"] == best_validation(self.path)["step"] and as_configured)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or not as lab-eval writes it
            return False

    def _scores(self) -> Any:
        return json.loads((self.path / "eval" / "test-best.json").read_text())

    def _lengths(self) -> list[str]:
        """The word that asks for the lengths of this config, with those that were scored for another, if the run's own are not all."""
        task = self.composed.config["task"]
        asked = set(task.get("eval_lengths") or ())
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            asked |= {int(length) // task["seq_len"] for length in self._scores()["by_length"]}
        with suppress(RunError):  # lab-eval will say what is wrong
            own = Run(self.path).config()["task"].get("eval_lengths")
            return [] if own is None or asked <= set(own) else [f"task.eval_lengths={sorted(asked)}"]
        return []

    def _trust(self) -> list[str]:
        """The user typed this config, so lab-eval may call what it names."""
        found = {str(target) for key, target in places(self.composed.config) if key[-1] == "_target_"}
        return [f"--trust={target}" for target in sorted(found) if not target.startswith("lab.")]

    @property
    def status(self) -> str:
        """What became of it, as its folder says; a job that never came to its folder has failed, and so has one that is not evaluated."""
        status = str(Run(self.path).job().get("status"))
        return status if status == "interrupted" else "failed"

    def score(self) -> float:
        """What a sweeper minimises: the validation loss of the best checkpoint; NaN for a job that is not done."""
        row = read(self.path)
        return row.val if row.status == "done" and row.val is not None else float("nan")

    def reason(self, command: str, pid: int, code: int, log_start: int) -> str:
        """Why a command of this job failed: by job.json, or, if it did not come to that, by the last line that it printed."""
        said = self.last_line(log_start)
        if command == EVAL:
            return f"trained, but not evaluated: {said or f'exit code {code}'}"
        job = Run(self.path).job()
        if job.get("pid") == pid and job.get("reason"):
            return str(job["reason"])
        return f"killed by {signal.Signals(-code).name}" if code < 0 else said or f"exit code {code}"

    def last_line(self, start: int = 0) -> str:
        with self.log.open("rb") as file:
            file.seek(start)
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("$ lab-") and BUSY not in line]  # of another sweep, that came too late
        return lines[-1].removeprefix("lab-train: ").removeprefix("lab-eval: ") if lines else ""
