"""A run is a folder under runs/: its config, what became of it, its metrics and its checkpoints.

    config.yaml       the resolved config; together with the seed it is the experiment
    hparams.yaml      choices, command, code version, git commit, package versions
    git_diff.patch    what the work tree had beside that commit, if anything
    job.json          status (running, done, failed, interrupted), the reason, the step
    metrics.jsonl     one row per log or validation step
    metrics.json      the latest evaluation
    metrics.csv       the rows by step, with logger=csv
    phases/           snapshots of the phases, attention/ of the attention maps, state_spaces/, experts/ (lab/training/monitoring.py)
    checkpoints/      last.ckpt to resume from, best.ckpt by validation; checkpoint.pt links to the best
    eval/             what lab-eval wrote
    exports/          what lab-export wrote
    job.log           of a sweep's job: what its commands printed

One process writes a run: it holds a lock on the folder, which the kernel drops when the process dies. A job that says
`running` without a held lock was therefore killed, and reads as interrupted.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from lab.config import ConfigError, config_hash
from lab.files import by_step, read_rows, unlike, write_json, write_text
from lab.training.provenance import code_version, environment, git_state, now

if TYPE_CHECKING:
    from pandas import DataFrame

    from lab.config import Composed
    from lab.models import SequenceModel

LOG, LOCK = "job.log", ".lock"
MONITOR = "val/ce_loss"  # the lowest of all validations chooses the best checkpoint of a run; the first of equals
BUSY = "another process writes this run"
PATIENCE = 1.0  # seconds that a writer waits for the lock: `locked` holds it for a moment
LOCKED_FOLDERS = ("checkpoints", "phases", "attention", "state_spaces", "experts")  # written by the holder of the lock alone
OWN_FOLDERS = (*LOCKED_FOLDERS, "eval", "exports")
OWN_FILES = (
    LOCK, LOG, ".*.tmp", "config.yaml", "hparams.yaml", "git_diff.patch", "job.json", "metrics.json", "metrics.jsonl", "checkpoint.pt",
    "metrics.csv", "phases/*.npz", "phases/.*.tmp", "attention/*.npz", "attention/.*.tmp", "state_spaces/*.npz",
    "state_spaces/.*.tmp", "experts/*.npz", "experts/.*.tmp",
    "events.out.tfevents.*", "checkpoints/last.ckpt", "checkpoints/best.ckpt", "checkpoints/.*.tmp",
    *(f"eval/{split}-{name}.json" for split in ("train", "val", "test") for name in ("best", "last")), "exports/best.*", "exports/last.*",
)  # fmt: skip


class RunError(Exception):
    """Something is wrong with a run: one sentence for the user."""

    exit_code = 1


class Busy(RunError):
    """Another process writes the run; the exit code is that of `try again later` (EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75


class Interrupted(RunError):
    """The run was told to stop by a signal, saved its state and stopped; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Run:
    """A run folder. Reading needs no lock; writing is done within `writer`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._writing = False
        self._began = 0.0  # by time.monotonic: when this process began to train

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run; RunError where the folder is not one."""
        run = cls(path)
        if not run.path.is_dir():
            raise RunError(f"{path}: there is no such run folder")
        if not run.exists():
            raise RunError(f"{path}: not a run of lab, it lacks config.yaml or hparams.yaml")
        return run

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def exists(self) -> bool:
        return (self.path / "config.yaml").is_file() and (self.path / "hparams.yaml").is_file()

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best.ckpt"

    # ------------------------------------------------------------------ what is stored

    def config(self) -> dict[str, Any]:
        return self._yaml("config.yaml", {"model": dict, "task": dict, "trainer": dict, "optimizer": dict})

    def hparams(self) -> dict[str, Any]:
        return self._yaml("hparams.yaml", {"choices": dict, "code_version": str, "git_commit": object})

    def job(self) -> dict[str, Any]:
        """job.json, its status corrected by the lock: {} if the run has not begun."""
        try:
            job = json.loads((self.path / "job.json").read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise RunError(f"{self.path / 'job.json'} is not valid JSON: {error}") from error
        if wrong := unlike(job, {"status": str}):
            raise RunError(f"{self.path / 'job.json'} is not that of a run of lab: {wrong}")
        if job["status"] == "running" and not self.locked():
            job |= {"status": "interrupted", "reason": "the process ended without a word (killed, or the machine stopped)"}
        return job

    def write_job(self, status: str, **more: Any) -> None:
        """seconds: of training and its validations, over all processes that were at it, but for those that were killed."""
        path = self.path / "job.json"
        job = json.loads(path.read_text()) if path.exists() else {}
        if status == "running":
            self._began = time.monotonic()
            began = {"started": job["started"], "resumed": now()} if job else {"started": now()}
            spent = {"seconds": job["seconds"]} if "seconds" in job else {}
            job = began | {"pid": os.getpid(), "host": socket.gethostname()} | spent
        else:
            job["ended"], job["seconds"] = now(), round(job.get("seconds", 0.0) + time.monotonic() - self._began, 1)
        write_json(path, job | {"status": status} | more)

    def write_config(self, composed: Composed) -> None:
        """config.yaml last: it is what makes the folder a run."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        commit, patch, untracked = git_state()
        if patch:
            write_text(self.path / "git_diff.patch", patch)
        hparams = {
            "choices": composed.choices,
            "command": shlex.join(["lab-train", *composed.overrides]),
            "config_hash": config_hash(composed.stored),
            "code_version": code_version(),
            "git_commit": commit,
            "git_dirty": bool(patch),
            "git_untracked": untracked,  # files that neither the commit nor the patch has
            "seed": composed.config["seed"],
            "created": now(),
            "env": environment(),
        }
        write_text(self.path / "hparams.yaml", yaml.safe_dump(hparams, sort_keys=False))
        write_text(self.path / "config.yaml", yaml.safe_dump(composed.stored, sort_keys=False))

    def write_resumed(self, stored: dict[str, Any], overrides: list[str]) -> None:
        """The config that a resume changed, and a note of it beside the first command."""
        hparams = self.hparams()
        hparams["config_hash"] = config_hash(stored)
        hparams["resumed"] = [*hparams.get("resumed", []), {"at": now(), "with": overrides}]
        write_text(self.path / "hparams.yaml", yaml.safe_dump(hparams, sort_keys=False))
        write_text(self.path / "config.yaml", yaml.safe_dump(stored, sort_keys=False))

    def clear(self) -> None:
        """Removes what a run wrote, and nothing else that lies in the folder. RunError, and nothing removed, if it is not a run's."""
        wandb = self.path / "wandb"  # a tree of W&B's own making, in a run
        files = [file for file in self.path.rglob("*") if not file.is_dir() and (wandb not in file.parents or not self.exists())]
        ours = [file for file in files if any(file.relative_to(self.path).match(pattern) for pattern in OWN_FILES)]
        if not self.exists() and (len(ours) < len(files) or (self.path / "config.yaml").exists()):
            raise RunError(f"{self.path} is not a run of lab, and not empty: choose another run_dir")
        for file in ours:
            if file.name not in (LOCK, LOG):  # a lock on a file without a name locks nobody out; the log is being written
                file.unlink()
        shutil.rmtree(wandb, ignore_errors=True)
        for name in OWN_FOLDERS:
            with suppress(OSError):  # not there, or something of the user's is in it
                (self.path / name).rmdir()

    def _yaml(self, name: str, types: Mapping[str, type]) -> dict[str, Any]:
        file = self.path / name
        try:
            stored = yaml.safe_load(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"{file} is missing: the run folder is not complete") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
        if wrong := unlike(stored, types):
            raise RunError(f"{file} is not that of a run of lab: {wrong}")
        return stored

    # ------------------------------------------------------------------ its results, for Python

    @property
    def metrics(self) -> dict[str, Any]:
        """metrics.json, the latest evaluation: `run.metrics["metrics"]["exact_match"]`. RunError before the run is done."""
        try:
            return json.loads((self.path / "metrics.json").read_text())
        except FileNotFoundError:
            raise RunError(f"{self.path} has no metrics.json yet; it is {self.job().get('status', 'not begun')}") from None
        except ValueError as error:
            raise RunError(f"{self.path / 'metrics.json'} is not valid JSON: {error}") from error

    def history(self) -> DataFrame:
        """metrics.jsonl as a table: a row for each step, its index; columns such as train/ce_loss and val/exact_match, NaN: not logged.

        RunError before anything is logged.
        """
        from pandas import DataFrame

        rows = by_step(read_rows(self.path / "metrics.jsonl"))
        if not rows:
            raise RunError(f"{self.path} has logged nothing yet; it is {self.job().get('status', 'not begun')}")
        return DataFrame(list(rows.values()), index=list(rows)).rename_axis("step").astype(float)

    def model(self, checkpoint: str = "best", trust: Sequence[str] = ()) -> SequenceModel:
        """The trained model in eval mode on the CPU; the arguments are those of `lab.load`, which also gives its task and config."""
        from lab.training.load import load

        return load(self.path, checkpoint, trust)[0]

    # ------------------------------------------------------------------ the lock

    @contextmanager
    def writer(self, exclusive: bool = True) -> Iterator[bool]:
        """Within it this process is the one writer of the folder: RunError if another one is. Yields `exclusive`.

        exclusive=False is for the processes of further devices, which write beside the one that holds the lock.
        """
        if not exclusive:
            yield False
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise RunError(f"{self.path} is a file; run_dir is the folder of a run") from None
        with (self.path / LOCK).open("a+") as lock:
            deadline = time.monotonic() + PATIENCE
            while not _lock(lock, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    lock.seek(0)
                    raise Busy(f"{self.path}: {BUSY} ({lock.read().strip()}); wait for it, or stop it")
                time.sleep(0.02)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            # A forked loader worker would keep the lock for seconds after a kill -9 of its parent; closing its copy frees nothing here.
            os.register_at_fork(after_in_child=lock.close)
            self._writing = True
            for folder in (self.path, *(self.path / name for name in LOCKED_FOLDERS)):
                for leftover in folder.glob(".*.tmp"):  # of a writer that was killed
                    leftover.unlink()
            try:
                yield True
            finally:
                self._writing = False
                if [file.name for file in self.path.iterdir()] == [LOCK]:  # nothing came of it
                    (self.path / LOCK).unlink()
                    self.path.rmdir()

    def locked(self) -> bool:
        """Whether any process holds the lock."""
        if self._writing:
            return True
        with suppress(FileNotFoundError), (self.path / LOCK).open() as lock:
            return not _lock(lock, fcntl.LOCK_SH)
        return False


def _lock(file: IO[str], kind: int) -> bool:
    """Whether this process has got the lock on the file, until that is closed."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def job_path(composed: Composed) -> Path:
    """runs/<experiment>/<config_hash>, without an experiment runs/<model>_<task>/...: the same job of two sweeps is one run."""
    name = composed.choices["experiment"]
    if name == "none":
        name = f"{composed.choices['model']}_{composed.choices['task']}"
    return Path("runs") / name / config_hash(composed.stored)


def new_run_path(composed: Composed) -> Path:
    """runs/<experiment>/<date>_<time>_<config_hash>"""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    path = job_path(composed)
    path = path.with_name(f"{stamp}_{path.name}")
    for n in range(2, 1000):  # the same job twice in one second
        if not path.exists():
            return path
        path = path.with_name(f"{stamp}_{config_hash(composed.stored)}_{n}")
    raise ConfigError(f"{path.parent} has a thousand runs of this very second")
