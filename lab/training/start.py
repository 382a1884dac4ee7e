"""`train` runs a composed config, `resume` continues a stored one; both end in `fit`, which leaves a run that says what happened.

Lightning is imported late, with `fit`: a config is checked, and its task and model are built, before those seconds are spent.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from lab.config import Composed, ConfigError, check, check_late, first_difference, override
from lab.config.errors import nearest
from lab.training.experiment import Experiment, prepare
from lab.training.provenance import code_version
from lab.training.run import Run, new_run_path

FOLDER_VARIABLE = "LAB_RUN_DIR"  # tells the processes that Lightning starts for further devices which folder is the run's
RESUMABLE = (
    "trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.num_workers", "trainer.reuse_memory",
    "trainer.log_every", "trainer.checkpoint_every", "trainer.max_steps", "trainer.max_epochs",
)  # fmt: skip
EXCLUDES = {"trainer.max_steps": "trainer.max_epochs", "trainer.max_epochs": "trainer.max_steps"}  # a length is given by one of them


def train(composed: Composed) -> Run:
    """Trains what the command line composed: in a new run folder, or in `run_dir` by the one rule of identity.

    An unfinished run of the same config resumes, a finished one is left as it is, one of another config is a ConfigError. Nothing is
    written, and nothing of an older run removed, before all of the config is known to be good.
    """
    with composed.saying_where():
        return _train(composed)


def _train(composed: Composed) -> Run:
    check(composed)
    experiment = prepare(composed.config)
    run = Run(_folder_of_this_rank() or experiment.run_dir or new_run_path(composed))
    with run.writer(exclusive=not _folder_of_this_rank()) as first:
        anew = first and (experiment.fresh or not run.exists())
        if first and not anew:
            difference = first_difference(composed.stored, run.config())
            if difference:
                raise ConfigError(f"run_dir={run.path} holds another experiment: {difference}; choose another, or fresh=true to start over")
            if run.job().get("status") == "done":
                print(f"{run.path} is finished; nothing to do (fresh=true would start over)")
                return run
            _warn_of_other_code(run)

        def begin() -> None:
            if anew:
                run.clear()
                run.write_config(composed)

        _fit(run, experiment, composed, begin, None, anew)
    return run


def resume(path: str, overrides: list[str], trust: list[str]) -> Run:
    """Continues a run by the config that it stored. Overrides may change the hardware and the length of training, nothing else."""
    run = Run.open(path)
    words = list(overrides)
    for word in overrides:
        key = word.lstrip("+~").partition("=")[0]
        if key not in RESUMABLE:
            near = nearest(key, RESUMABLE)
            right = f"; did you mean {near}?" if near else f", its stored config decides; allowed are {', '.join(RESUMABLE)}"
            raise ConfigError(f"{key} cannot change when a run is resumed{right}")
        if key in EXCLUDES:
            words.insert(0, f"{EXCLUDES[key]}=null")
    composed = override(run.config(), words, run.path / "config.yaml", run.hparams()["choices"])
    with composed.saying_where():
        return _resume(run, composed, overrides, trust)


def _resume(run: Run, composed: Composed, overrides: list[str], trust: list[str]) -> Run:
    check(composed, trust=trust)
    experiment = prepare(composed.config, trust)
    with run.writer(exclusive=not _folder_of_this_rank()) as first:
        job = run.job()
        if first and job.get("status") == "done" and experiment.max_steps <= job["step"]:
            print(f"{run.path} is finished at step {job['step']}; a larger trainer.max_steps would go on from there")
            return run

        def begin() -> None:
            if overrides:
                run.write_resumed(composed.stored, overrides)
            if len(composed.overrides) > len(overrides):
                print(f"with {' '.join(overrides)}: the schedule of the learning rate is now that of {experiment.max_steps} steps")
            _warn_of_other_code(run)

        _fit(run, experiment, composed, begin, trust, anew=False)
    return run


def _fit(
    run: Run, experiment: Experiment, composed: Composed, begin: Callable[[], None], trust: list[str] | None, anew: bool
) -> None:  # fmt: skip
    from lab.training.fit import fit

    check_late(composed, trust=trust)
    os.environ[FOLDER_VARIABLE] = str(run.path.resolve())
    try:
        fit(run, experiment, composed.stored, trust, begin, anew)
    finally:
        del os.environ[FOLDER_VARIABLE]


def _folder_of_this_rank() -> str | None:
    """The run's folder in a process that Lightning started for a further device; None in the one that the user started."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        return None
    if FOLDER_VARIABLE not in os.environ:
        raise ConfigError("lab-train starts the processes of its devices itself: run it once, with trainer.devices=N, not under torchrun")
    return os.environ[FOLDER_VARIABLE]


def _warn_of_other_code(run: Run) -> None:
    stored = run.hparams()["code_version"]
    if stored != code_version():
        print(f"warning: {run.path} was begun with code version {stored}, this is {code_version()}: the result is of both", flush=True)
