"""A comparison: an experiment whose file says as well which models it is about, with which seeds, and what is expected of them.

    models     name: [words of lab-train, ...]      or a list of names, each an option of the group `model`
    seeds      a list, or how many, from 1 on; on the command line as well
    pairs      which two are compared: [[a, b], ...], or a name, with which each other one is; all, if it is left out
    expect     a list of expectations (lab/analysis/expectations.py)

Any other experiment is one as soon as the command line names `models`. Everything else in the file is the experiment that all models have
in common. A run is `lab-train` with the words of its model and a seed, then `lab-eval` on the test split: a sweep, of which the pool, the
folders, skipping and resuming are those of any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lab.analysis.comparison import FILE, OTHER_DATA, Comparison, document
from lab.analysis.page.document import page
from lab.files import atomic, write_json, write_text
from lab.sweeps.multirun import Sweep

PAGE = "page.html"  # beside comparison.json
DONE = ("done", OTHER_DATA)  # nothing is left to do of these


@dataclass
class Plan(Sweep):
    """The sweep of a comparison; what is known of it is in comparison.json after each run."""

    comparison: Comparison = field(kw_only=True)

    @cached_property
    def runs(self) -> list[tuple[str, int, list[str]]]:
        """(model, seed, its words) of each run: the first seed of all models first."""
        models, seeds = self.comparison.models, self.comparison.seeds
        return [(name, seed, [*words, f"seed={seed}"]) for seed in seeds for name, words in models.items()]

    def record(self, job: Any, reason: str | None) -> None:
        super().record(job, reason)
        self.write()

    def write(self) -> dict[str, Any]:
        """comparison.json, of what the folders of the runs say by now."""
        reasons = {job["folder"]: job["reason"] for job in self.jobs()}
        runs = []
        for model, seed, own in self.runs:
            folder = self.job(own).path
            runs.append({"model": model, "seed": seed, "words": [*self.shared, *own], "folder": folder, "reason": reasons.get(str(folder))})
        written = document(self.comparison, runs)
        write_json(self.path / FILE, written)
        return written

    def draw(self, written: Mapping[str, Any]) -> None:
        """page.html, and curves.png and curves.svg where something is done."""
        write_text(self.path / PAGE, page([str(self.path)]))
        if not written["curves"]:
            return
        from lab.analysis.curves import plot_curves  # matplotlib takes a second

        figure = plot_curves(written["curves"], len(written["seeds"]))
        for ending in ("png", "svg"):
            with atomic(self.path / f"curves.{ending}") as picture:
                figure.savefig(picture, format=ending, dpi=150)


def compare(comparison: Comparison) -> tuple[dict[str, Any], Path, int]:
    """Does what is left of it; the document, the folder it was written to, and how many runs are not trained or not scored. Interrupted
    if a signal ended it."""
    plan = Plan(comparison.words, comparison.shared, Path(), comparison=comparison)
    folders = sorted({str(plan.job(own).path) for _, _, own in plan.runs})
    asked = [folders, comparison.pairs, [asdict(expectation) for expectation in comparison.expectations]]
    plan.path = Path("runs", "comparisons", f"{comparison.name}_{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}")
    with plan.alive():
        try:
            plan.run([own for _, _, own in plan.runs], comparison.n_jobs, comparison.threads)
        finally:
            written = plan.write()
            plan.draw(written)
        failed = {job["folder"] for job in plan.jobs() if job["reason"]}
    return written, plan.path, sum(run["status"] not in DONE or run["folder"] in failed for run in written["runs"])
