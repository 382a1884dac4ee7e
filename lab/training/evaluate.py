"""`evaluate_run`: the scores of a stored model on a split, by everything that the run's own config says. `evaluate_pretrained`: those of
public weights, which have no config, on a task that the user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lab import ops
from lab.config import ConfigError, check, compose
from lab.config.errors import nearest
from lab.files import write_json
from lab.models import SequenceModel
from lab.models.pretrained import load_pretrained, vocabulary
from lab.tasks import EvalLoader, Task
from lab.tasks.base import SPLITS
from lab.training.document import metrics_document
from lab.training.experiment import build_node, force_ops
from lab.training.load import check_config_file, check_same_data, find_checkpoint, load_checkpoint
from lab.training.provenance import code_version, git_state
from lab.training.run import Run, RunError

OPTIONS = {"split": SPLITS, "checkpoint": ("best", "last")}  # of lab-eval itself, with their choices
OVERRIDABLE = (
    "task.eval_lengths", "task.eval_stride", "task.path", "trainer.batch_size", "trainer.accelerator", "trainer.num_workers",
    *(f"ops.{op}" for op in ops.ops()),
)  # fmt: skip


def evaluate_run(target: str, overrides: list[str], trust: list[str], config_file: str | None = None) -> tuple[dict[str, Any], Path]:
    """Evaluates a run or a checkpoint; returns the scores and the file they were written to.

    In a run that is eval/<split>-<checkpoint>.json, and metrics.json as well; a checkpoint that lies elsewhere gets a file beside it.

    overrides: split (default test), checkpoint (best), and the keys of OVERRIDABLE. config_file: a config that must not contradict the
    run's own. Raises RunError or ConfigError.
    """
    own, of_the_run = _sort(overrides)
    path = find_checkpoint(target, own.get("checkpoint"))
    loaded = load_checkpoint(path, trust, of_the_run)
    if config_file is not None:
        check_config_file(config_file, loaded.identity, "lab-eval")
    trainer, task = loaded.config["trainer"], loaded.task
    check_same_data(path, loaded.identity, task)
    model = loaded.model.to(_device(trainer["accelerator"]))

    metrics, tables, by_length = _measure(model, task, own["split"], trainer)
    document = metrics_document(
        model,
        loaded.identity,
        seq_len=task.seq_len,
        checkpoint=path.stem,
        split=own["split"],
        step=loaded.step,
        seed=loaded.config["seed"],
        metrics=metrics,
        tables=tables,
        by_length=by_length,
        references=task.references(own["split"]),
        published=task.reference,
        data={**task.facts(), **task.split(own["split"]).facts()},
    )
    file = path.with_name(f"{path.stem}.{own['split']}.json")
    run = Run(path.parent.parent)
    if path.parent == run.checkpoints and run.exists():
        file = run.path / "eval" / f"{own['split']}-{path.stem}.json"
        write_json(run.path / "metrics.json", document)
    write_json(file, document)
    return document, file


def evaluate_pretrained(folder: str, overrides: list[str], config_file: str | None = None) -> tuple[dict[str, Any], Path]:
    """Evaluates the public weights of a folder; returns the scores and the file they were written to, eval/TASK-SPLIT.json in the folder.

    overrides: task=NAME or experiment=NAME, which says the task and how it is scored, split (default test), and keys of them, as
    task.seq_len. config_file: an experiment's file instead. Raises RunError or ConfigError.
    """
    own: dict[str, str] = {"split": "test"}
    words = [f"--config={config_file}"] if config_file is not None else []
    for word in overrides:
        key, _, value = word.partition("=")
        if key == "split":
            own["split"] = _choice(key, value)
        elif key == "checkpoint" or key.partition(".")[0] == "model":
            raise ConfigError(
                f"{word}: the model and its weights are those of {folder}; task=, experiment= and split= say what it is scored on"
            )
        else:
            words.append(word)
    if not any(word.startswith(("--config=", "experiment=", "task=")) for word in words):
        raise ConfigError(f"{folder} is a folder of public weights, which has no task of its own: add task=NAME or experiment=NAME")
    composed = compose(words, matching=False)  # the model is not the config's
    check(composed)
    with composed.saying_where():
        task, trainer = build_node("task", composed.config["task"], None), composed.config["trainer"]
        force_ops(composed.config["ops"], None)
    model = load_pretrained(folder)
    vocab_size, choice = vocabulary(model), composed.choices["task"]
    if task.vocab_size != vocab_size:
        raise ConfigError(
            f"task={choice} has {task.vocab_size:,} tokens and the model of {folder} {vocab_size:,}: what a token stands for must be the "
            "same, so it can only be scored on a task of its own vocabulary"
        )
    file = Path(folder) / "eval" / f"{choice}-{own['split']}.json"
    file.parent.mkdir(exist_ok=True)  # before the scores are computed: a folder that cannot be written loses none
    metrics, tables, by_length = _measure(model.to(_device(trainer["accelerator"])), task, own["split"], trainer)
    document = metrics_document(
        model,
        {
            "choices": {"task": choice, "model": Path(folder).resolve().name},
            "config_hash": None,
            "code_version": code_version(),
            "git_commit": git_state()[0],
        },
        seq_len=task.seq_len,
        checkpoint="public weights",
        split=own["split"],
        step=None,
        seed=None,
        metrics=metrics,
        tables=tables,
        by_length=by_length,
        references=task.references(own["split"]),
        published=task.reference,
        data={**task.facts(), **task.split(own["split"]).facts()},
    )
    write_json(file, document)
    return document, file


def _measure(
    model: SequenceModel, task: Task, split: str, trainer: dict[str, Any]
) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """metrics, tables (accuracy by position, ...), and the metrics at each input length that the task asks for."""

    def measure(scale: int) -> tuple[dict[str, float], dict[str, Any]]:
        batch_size = max(trainer["batch_size"] // scale, 1)  # as many tokens at once
        return score(model, task, split, scale, batch_size, trainer["num_workers"])

    metrics, tables = measure(1)
    by_length: dict[str, Any] = {str(task.seq_len): metrics}
    for scale in sorted(set(task.eval_lengths) - {1}):
        length = task.seq_len * scale
        if model.max_len is not None and length > model.max_len:
            by_length[str(length)] = f"not applicable (max_len {model.max_len})"
        else:
            by_length[str(length)] = measure(scale)[0]
    return metrics, tables, by_length


def score(
    model: SequenceModel, task: Task, split: str, scale: int, batch_size: int, num_workers: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """(metrics, tables) of a model in eval mode on a whole split, free-running decoding of every row included."""
    from lab.analysis.metrics import Evaluation

    samples = task.split(split, scale)
    device = next(model.parameters()).device
    evaluation = Evaluation(task, model, free_samples=len(samples), scale=scale).to(device)
    with torch.inference_mode():
        for batch in EvalLoader(samples, batch_size, num_workers=num_workers):
            evaluation.update(model, batch.to(device))
        return evaluation.compute(model)


def _sort(overrides: list[str]) -> tuple[dict[str, str], list[str]]:
    """lab-eval's own options, and the overrides of the run's config; a key that would change what was trained is refused."""
    own: dict[str, str] = {"split": "test"}
    of_the_run = []
    for word in overrides:
        key, _, value = word.partition("=")
        if key in OPTIONS:
            own[key] = _choice(key, value)
        elif key in OVERRIDABLE:
            of_the_run.append(word)
        else:
            near = nearest(key, (*OPTIONS, *OVERRIDABLE))
            allowed = f"the run's own config decides; allowed are {', '.join((*OPTIONS, *OVERRIDABLE))}"
            raise ConfigError(f"{key} cannot change in lab-eval" + (f"; did you mean {near}?" if near else f", {allowed}"))
    return own, of_the_run


def _choice(key: str, value: str) -> str:
    if value not in OPTIONS[key]:
        raise ConfigError(f"{key} must be one of {', '.join(OPTIONS[key])}, got {value!r}")
    return value


def _device(accelerator: str) -> torch.device:
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    if accelerator in ("gpu", "cuda"):
        if not torch.cuda.is_available():
            raise RunError("trainer.accelerator=gpu: torch finds no GPU here; trainer.accelerator=cpu evaluates on the CPU")
        return torch.device("cuda")
    return torch.device(accelerator)
