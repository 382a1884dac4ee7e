"""What a person sees of a sweep: a line for each job that ends, and in a terminal, below, the jobs that are running."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lab.analysis.report import last_step, number, read
from lab.sweeps.job import EVAL, Job

REFRESH = 1.0  # seconds


class Overview:
    """total: how many jobs there are."""

    def __init__(self, total: int) -> None:
        self.console = Console(soft_wrap=True)
        self.total, self.n_ended, self.n_failed = total, 0, 0
        self.began: dict[str, float] = {}  # when a job that is running was first seen
        self._live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        self._next = 0.0

    def __enter__(self) -> None:
        if self._live:
            self._live.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def ended(self, job: Job, what: str) -> None:
        self.n_ended += 1
        failed = what.startswith(("failed", "interrupted"))
        self.n_failed += failed
        row = read(job.path)
        scores = [f"val ce_loss {number(row.val)}"] if row.val is not None and what.startswith("done") else []
        scores += [f"test {name} {number(value)}" for name, value in row.test.items() if name in ("ce_loss", "exact_match") and scores]
        began = self.began.pop(job.label, None)
        scores += [f"{time.monotonic() - began:.0f} s"] if began else []
        line = f"[{self.n_ended}/{self.total}] {job.label}  {what}{'  ' if scores else ''}{', '.join(scores)}"
        self.console.print(Text(f"{line}  ({job.log})" if failed else line))

    def say(self, text: str) -> None:
        self.console.print(Text(text))

    def show(self, running: Sequence[tuple[Job, str]]) -> None:
        for job, _ in running:
            if job.label not in self.began:
                self.began[job.label] = time.monotonic()
                if self._live is None:
                    self.console.print(Text(f"{job.label}  begins  ({job.path})"))
        if self._live is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + REFRESH
        table = Table("running", "step", "of", "seconds", title=f"{self.n_ended} of {self.total} jobs have ended, {self.n_failed} failed")
        for job, command in running:
            step = "evaluation" if command == EVAL else str(last_step(job.path) or "starts")
            steps = job.composed.config["trainer"].get("max_steps") or f"{job.composed.config['trainer'].get('max_epochs')} epochs"
            table.add_row(Text(job.label), step, str(steps), f"{time.monotonic() - self.began[job.label]:.0f}")
        self._live.update(table, refresh=True)
