"""A sweep: Hydra's sweeper turns the words into jobs, Hydra's launcher runs them. What a word means is said by lab.config alone.

    words with several values   model=lot,transformer seed=range(3)     the sweeper's, in its grammar
    words with one value        experiment=x --config=FILE              shared by all jobs
    words about Hydra           hydra.launcher.n_jobs=2                 for the launcher and the sweeper themselves

Hydra asks its ConfigLoader for the config of each job before any is started: ours composes and checks it as for a plain lab-train.
Our launcher is a pool of processes; with another one, each job is `Sweep.__call__` wherever that launcher calls it. Skip, resume and
lock live in the job, so all of them find the same runs.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import hydra
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from lab.analysis.render import render, show
from lab.analysis.report import SWEEP, by_run, by_seed, rows
from lab.config import ConfigError, check, check_late, compose, files
from lab.config.errors import hint
from lab.config.overrides import SHELL, parse, quote
from lab.config.validation import LATE
from lab.files import write_json, write_text
from lab.sweeps.job import Job
from lab.sweeps.overview import Overview
from lab.sweeps.pool import Pool
from lab.training.provenance import now
from lab.training.run import RunError

OF_A_RUN = {"run_dir": "each job has a folder of its own, by its config", "resume": "the same sweep again resumes what is unfinished"}
NOT_THE_SWEEPS = re.compile(r"hydra[./]launcher|fresh=")
"""Words that do not make another sweep: how its jobs are started, and whether from the beginning."""
ALIVE = ".alive"  # each process of a sweep shares a lock on it for its life

HYDRA_KEYS = ("hydra.launcher.n_jobs", "hydra.sweeper.max_batch_size")  # those that a sweep of ours has a use for


def sweep(words: list[str]) -> None:
    """Runs all jobs of the words and writes their table; RunError if any of them failed, Interrupted if a signal ended it.

    ConfigError, before any job of Hydra's batch starts, for a mistake in the words of one of them.
    """
    about_hydra, swept, shared = sort(words)
    identity = sorted(word for word in words if not NOT_THE_SWEEPS.match(word.lstrip("+")))
    path = Path("runs", "sweeps", hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8])
    plan = Sweep(words, shared, path)
    with plan.alive():
        try:
            _multirun(plan, about_hydra, swept)
        except (HydraException, OmegaConfBaseException) as error:
            unknown = re.search(r"Could not override '(hydra\.[\w.]+)'", str(error))
            if unknown:
                raise ConfigError(f"{unknown[1]} ({SHELL}): there is no such key{hint(unknown[1], HYDRA_KEYS)}") from None
            raise ConfigError(f"-m: {' '.join(str(error).partition('Config search path')[0].split())}") from error
        finally:
            if plan.file.exists():
                plan.write_table()
        jobs = plan.jobs()
    failed = [job for job in jobs if job["reason"]]
    if not jobs:
        raise ConfigError(f"{' '.join(swept)} ({SHELL}): these values give no job")
    if failed:
        raise RunError(f"{len(failed)} of {len(jobs)} jobs failed; the same command tries those again")


def sort(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(about Hydra itself, with several values, with one value); ConfigError for what cannot be read or belongs to a single run."""
    about_hydra: list[str] = []
    swept: list[str] = []
    shared: list[str] = []
    for word in words:
        if re.match(r"[+~]*hydra[./]", word):
            about_hydra.append(word)
        elif word.startswith("--config="):
            shared.append(word)
        else:
            override = parse(word, sweep=True)
            if override.key_or_group in OF_A_RUN:
                raise ConfigError(f"{override.key_or_group} ({SHELL}): not with -m: {OF_A_RUN[override.key_or_group]}")
            (swept if override.is_sweep_override() else shared).append(word)
    return about_hydra, swept, shared


@dataclass
class Sweep:
    """What the jobs of one sweep have in common. It is also the task function of Hydra's launchers, which may pickle it."""

    words: list[str]
    shared: list[str]
    path: Path  # runs/sweeps/<hash of the words>
    known: dict[tuple[str, ...], Job] = field(default_factory=dict)

    @cached_property
    def default(self) -> dict[str, Any]:
        """The config without any words."""
        return compose([]).config

    def job(self, own: Sequence[str]) -> Job:
        """The job of these words beside the shared ones, composed and checked; ConfigError for a mistake in them."""
        if tuple(own) not in self.known:
            composed = compose([*self.shared, *own])
            check(composed)
            if any(composed.config.get(key) != self.default.get(key) for key in LATE):  # what is lab's own is right
                check_late(composed)
            self.known[tuple(own)] = Job(self.shared, list(own), composed)
        return self.known[tuple(own)]

    def run(self, batch: Sequence[Sequence[str]], n_jobs: int, threads: int | None = None) -> list[float]:
        """Runs the jobs, n_jobs at a time, those that are the same experiment once; the score of each, which a sweeper minimises."""
        jobs = [self.job(own) for own in batch]
        if not jobs:
            return []
        distinct = list({job.path: job for job in reversed(jobs)}.values())[::-1]
        if len(distinct) < len(jobs):
            print(f"{len(jobs)} jobs, of which {len(distinct)} are different experiments; those are run")
        self.begin(distinct)
        Pool(n_jobs, Overview(len(distinct)), self.record, threads).run(distinct)
        return [job.score() for job in jobs]

    def __call__(self, config: DictConfig) -> float:
        """The task function, for a launcher that is not ours."""
        return self.run([list(HydraConfig.get().overrides.task)], n_jobs=1)[0]

    # ------------------------------------------------------------------ what it writes

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Within it sweep.json is that of now. Several processes may sweep the same words at once: the first one begins it anew, and
        the last one removes it if no job came of it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ALIVE).open("a") as lock:
            if _only(lock):
                self.file.unlink(missing_ok=True)
            fcntl.flock(lock, fcntl.LOCK_SH)
            try:
                yield
            finally:
                if not self.file.exists() and _only(lock):
                    for name in ("multirun.yaml", ".lock", ALIVE):
                        (self.path / name).unlink(missing_ok=True)
                    with suppress(OSError):  # something of the user's is in it
                        self.path.rmdir()

    @property
    def file(self) -> Path:
        return self.path / SWEEP

    def jobs(self) -> list[dict[str, Any]]:
        """{words, folder, reason} of each; the reason is why it failed."""
        return json.loads(self.file.read_text())["jobs"] if self.file.exists() else []

    def begin(self, jobs: Sequence[Job]) -> None:
        """Adds those that are not there; what is known of the others, perhaps by another process, stays until they end again."""
        with self._jobs_by_folder() as known:
            for job in jobs:
                known.setdefault(str(job.path), _entry(job, None))

    def record(self, job: Job, reason: str | None) -> None:
        """What became of a job; by any process of the sweep."""
        with self._jobs_by_folder() as known:
            known[str(job.path)] = _entry(job, reason)

    @contextmanager
    def _jobs_by_folder(self) -> Iterator[dict[str, dict[str, Any]]]:
        """To be changed within it, by one process at a time, and written at its end."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = {job["folder"]: job for job in self.jobs()}
            yield known
            write_json(self.file, {"words": self.words, "written": now(), "jobs": list(known.values())})

    def write_table(self) -> None:
        """table.md, table.csv and table.json beside sweep.json, and the same for the eye."""
        found = rows([str(self.path)])
        report = by_run(found)
        write_text(self.path / "table.md", render(report, "markdown"))
        write_text(self.path / "table.csv", render(report, "csv"))
        write_text(self.path / "table.json", render(report, "json"))
        show(report)
        if len({row.config.get("seed") for row in found}) > 1:
            show(by_seed(found))
        print(f"written to {self.path}/table.md, .csv and .json; lab-report {self.path} shows it again", flush=True)


def _entry(job: Job, reason: str | None) -> dict[str, Any]:
    return {"words": job.own, "folder": str(job.path), "reason": reason}


def _only(lock: IO[str]) -> bool:
    """Whether no other process has the lock; this one then has it alone."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# ----------------------------------------------------------------------- Hydra


class Loader(ConfigLoaderImpl):
    """How Hydra's sweepers and launchers ask for the config of a job, and for the options of a group in `glob(*)`."""

    def __init__(self, plain: ConfigLoader, plan: Sweep) -> None:
        super().__init__(config_search_path=plain.get_search_path())
        self.plan = plan

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        self.plan.job(sweep_overrides)
        config = copy.deepcopy(master_config)
        with open_dict(config):
            config.hydra.mode = RunMode.RUN
            config.hydra.overrides.task = list(sweep_overrides)
        return config

    def get_group_options(
        self, group_name: str, results_filter: ObjectType | None = None, config_name: str | None = None, overrides: list[str] | None = None
    ) -> list[str]:
        return sorted(name for name in files.options().get(group_name, ()) if (group_name, name) != ("experiment", "none"))


def _multirun(plan: Sweep, about_hydra: list[str], swept: list[str]) -> None:
    """What hydra.main does with -m, by Hydra's own sweeper and launcher."""
    folder = str(Path(__file__).with_name("plugin"))
    if folder not in sys.path:
        sys.path.append(folder)
    Plugins.instance().register(importlib.import_module("hydra_plugins.lab_launcher").LabLauncher)
    settings = [
        f"hydra.sweep.dir={quote(str(plan.path))}", "hydra.sweep.subdir=.", "hydra.output_subdir=null", "hydra.job.chdir=false",
        "hydra/job_logging=none", "hydra/hydra_logging=none", "hydra/launcher=lab",
    ]  # fmt: skip
    chosen = {word.lstrip("+").partition("=")[0] for word in about_hydra}
    settings = [word for word in settings if word.partition("=")[0] not in chosen]
    with hydra.initialize(version_base="1.3", config_path=None, job_name="lab"):
        loader = Loader(GlobalHydra.instance().config_loader(), plan)
        config = loader.load_configuration(None, [*settings, *about_hydra], RunMode.MULTIRUN)
    callbacks = Callbacks(config)
    context = HydraContext(config_loader=loader, callbacks=callbacks)
    sweeper = Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=plan, config=config)
    callbacks.on_multirun_start(config=config, config_name=None)
    try:
        sweeper.sweep(arguments=swept)
    finally:
        callbacks.on_multirun_end(config=config, config_name=None)
