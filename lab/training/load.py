"""`lab.load`: a trained model from a run or a checkpoint, without executing code that the file brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lab import ops
from lab.config import ConfigError, check, compose, first_difference, override
from lab.models import SequenceModel
from lab.tasks import Task
from lab.training.checkpoint import keep_random_states, read_checkpoint
from lab.training.experiment import prepare
from lab.training.run import Run, RunError


class Loaded(NamedTuple):
    model: SequenceModel
    task: Task
    config: dict[str, Any]  # resolved
    identity: dict[str, Any]  # the entry "lab" of the checkpoint
    step: int


def load(target: str | Path, checkpoint: str | None = None, trust: Sequence[str] = ()) -> tuple[SequenceModel, Task, dict[str, Any]]:
    """(model in eval mode on the CPU, task, resolved config) of a run folder or a checkpoint file.

    checkpoint: `best` (by validation, the default) or `last`, of a run. trust: prefixes of `_target_` beside lab's own that may be
    built, such as "mypackage"; a config is code, and a run may come from anywhere. Raises RunError or ConfigError in one sentence.
    Ops that the run's config forced are not forced here: that is for `ops.use` to say.
    """
    with ops.use(), keep_random_states():  # building a model draws
        loaded = load_checkpoint(find_checkpoint(target, checkpoint), list(trust))
    return loaded.model, loaded.task, loaded.config


def find_checkpoint(target: str | Path, checkpoint: str | None = None) -> Path:
    """The checkpoint file that a run folder (best, if nothing else is said) or a file name stands for."""
    path = Path(target)
    if path.is_file():
        if checkpoint is not None:
            raise RunError(f"{path} is a checkpoint itself: checkpoint={checkpoint} chooses one of a run")
        return path.resolve()
    checkpoint = checkpoint or "best"
    run = Run.open(path)
    file = run.checkpoints / f"{checkpoint}.ckpt"
    if not file.exists():
        job = run.job()
        status = f"it is {job['status']}" + (f": {job['reason']}" if job.get("reason") else "") if job else "it has not begun"
        others = [name for name in ("best", "last") if (run.checkpoints / f"{name}.ckpt").exists()]
        status += f"; it has {others[0]}.ckpt: checkpoint={others[0]}" if others else ""
        raise RunError(f"{path} has no checkpoint {file.name}; {status}")
    return file


def load_checkpoint(path: Path, trust: list[str], overrides: Sequence[str] = ()) -> Loaded:
    """overrides: values that replace those of the stored config, for lab-eval's own options."""
    checkpoint = read_checkpoint(path)
    identity = checkpoint["lab"]
    stored = {key: node for key, node in identity["config"].items() if key not in ("callbacks", "logger")}  # of training alone
    composed = override(stored, list(overrides), path, identity["choices"])
    with composed.saying_where():
        check(composed, trust=trust)
        experiment = prepare(composed.config, trust, to_train=False)
    experiment.task.restore(identity.get("task", {}))
    weights = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items() if name.startswith("model.")}
    try:
        experiment.model.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(
            f"{path}: its weights do not fit the model of its config in this version of lab: {str(error).splitlines()[-1].strip()}"
        ) from error
    model = experiment.model.double() if experiment.trainer.precision == "64-true" else experiment.model
    return Loaded(model.eval(), experiment.task, composed.config, identity, checkpoint["global_step"])


def check_config_file(config_file: str, identity: dict[str, Any], command: str) -> None:
    """ConfigError where an experiment's file contradicts the config that a checkpoint stored."""
    difference = first_difference(compose([f"--config={config_file}"]).stored, identity["config"])
    if difference:
        raise ConfigError(f"--config {config_file} contradicts the run: {difference}; {command} uses the run's own config")


def check_same_data(path: Path, identity: Mapping[str, Any], task: Task) -> None:
    """RunError where the data that a checkpoint was trained on is not what its config stands for here and now."""
    then, here = identity.get("data", {}), task.facts()
    if "sha256" in then and then["sha256"] != here.get("sha256"):
        sentences = (f"{name} {then[name]} then, {here.get(name)} here" for name in then if then[name] != here.get(name))
        raise RunError(f"{path} was trained on other data, so that its splits are not the ones here: {'; '.join(sentences)}")
