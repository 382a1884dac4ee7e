"""The root of a config, and from a config to the objects that it describes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lab import ops
from lab.config import ConfigError, MistakeError, build
from lab.config.targets import own_backend
from lab.config.tree import Key, dotted, places
from lab.models import SequenceModel, initialise
from lab.models.base import evaluating
from lab.tasks import Task
from lab.tasks.loader import steps_per_epoch
from lab.training.loss_weights import LossWeight, parse_loss_weights
from lab.training.optimizer import AdamW
from lab.training.settings import Settings


@dataclass(frozen=True)
class Experiment:
    """The root of a config: its keys are these fields, each node under them the keyword arguments of what it names with `_target_`."""

    model: SequenceModel
    task: Task
    trainer: Settings
    optimizer: AdamW
    callbacks: Mapping[str, Any] | None = None
    logger: Any = None
    loss_weights: Mapping[str, Any] = field(default_factory=dict)
    ops: Mapping[str, str] = field(default_factory=dict)
    seed: int = 42
    run_dir: str | None = None
    resume: str | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")

    @property
    def weights(self) -> dict[str, LossWeight]:
        return parse_loss_weights(self.loss_weights, self.model.loss_names, "the model")

    @property
    def max_steps(self) -> int:
        return self.trainer.steps(self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.task.split("train"), self.trainer.batch_size, self.trainer.accumulate, self.task.carry_state)


def prepare(config: Mapping[str, Any], trust: list[str] | None = None, to_train: bool = True) -> Experiment:
    """Builds what a config describes, the callbacks and the logger excepted; the weights are those of its seed, the ops as it forces them.

    trust: None allows any `_target_` (a config that the user typed), a list only those of lab and these prefixes.
    to_train: False for a model that is loaded, which needs no training data. ConfigError names the node whose values do not fit together.
    """
    built = {name: build_node(name, config[name], trust) for name in ("task", "trainer", "optimizer", "model")}
    try:
        experiment = Experiment(**{**config, **built})
        check_head(experiment.model, experiment.task, config["model"])
        check_causal(experiment.model, experiment.task, config["model"])
        check_source(experiment.model, experiment.task)
        if to_train and experiment.task.carry_state:
            check_carries(experiment.model)
        _ = experiment.weights, experiment.max_steps if to_train else None
        force_ops(experiment.ops, trust)
    except ValueError as error:
        raise _mistake(error, dict(config), ()) from error
    initialise(experiment.model, experiment.seed)
    return experiment


def force_ops(choices: Mapping[str, str], trust: list[str] | None) -> None:
    """The backends of a config's `ops`, for this process; what was used before is forgotten."""
    ops.force({op: own_backend(op, name, trust) if "." in name else name for op, name in choices.items()})
    ops.forget()


def check_head(model: SequenceModel, task: Task, node: Any) -> None:
    """MistakeError for a model that classifies where the task predicts tokens, the other way round, or with another number of classes."""
    name, wanted = type(task).__name__, task.n_classes
    if wanted is None and model.n_classes is not None:
        problem = f"task {name} predicts tokens, and the model has a pooled head of {model.n_classes} classes; it must be null"
        raise MistakeError(("model", "n_classes"), problem)
    if wanted is not None and "n_classes" not in node:
        problem = f"task {name} has {wanted} classes, and {type(model).__name__} has no pooled head: it takes no n_classes"
        raise MistakeError(("model",), problem)
    if model.n_classes != wanted:
        has = "predicts tokens" if model.n_classes is None else f"has {model.n_classes}"
        raise MistakeError(("model", "n_classes"), f"task {name} has {wanted} classes, and the model {has}; it must be {wanted}")
    if wanted is not None and model.n_answers != task.n_answers:
        problem = f"task {name} has {task.n_answers} answers, and the model {model.n_answers}; it must be {task.n_answers}"
        raise MistakeError(("model", "n_answers"), problem)


def check_causal(model: SequenceModel, task: Task, node: Any) -> None:
    """MistakeError for a model that reads the tokens which the task wants predicted."""
    if task.next_token and not model.causal:
        keys = [key for key, value in places(node, ("model",)) if key[-1] == "bidirectional" and value is True]
        problem = f"the model reads the future, and task {type(task).__name__} predicts the next token"
        raise MistakeError(keys[0] if keys else ("model",), f"{problem}; it must be false" if keys else problem, suspects=keys)


def check_carries(model: SequenceModel) -> None:
    """MistakeError for a model whose state cannot go on over the whole of a stream: a stream has no longest length."""
    key, advice = ("task", "carry_state"), "a model with a state of fixed size, such as model=mamba, can be trained so"
    if model.max_len is not None:
        raise MistakeError(key, f"a stream has no longest length, and the model was built with max_len {model.max_len}; {advice}")
    sizes = []
    with evaluating(model):
        for length in (8, 16):
            state = model(torch.zeros(1, length, dtype=torch.long), want=("state",)).state
            sizes.append(sum(leaf.numel() for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)))
    if sizes[1] > sizes[0]:
        raise MistakeError(key, f"a stream has no longest length, and the model's state grows with every token; {advice}")


def check_source(model: SequenceModel, task: Task) -> None:
    """MistakeError for a decoder on batches with a source, or for an encoder-decoder on batches without."""
    if model.takes_source == (task.start_token is not None):
        return
    if model.takes_source:
        problem = "the model is an encoder-decoder, and the task gives it no source; task.source=true does, where a task has it"
    else:
        problem = "the task has a source, and the model is a decoder that takes none; model=transformer_seq2seq does"
    raise MistakeError(("task", "source") if task.start_token is not None else ("model",), problem)


def build_node(name: str, node: Any, trust: list[str] | None) -> Any:
    """The object of a node; MistakeError for what its constructor, or one inside of it, refuses."""
    try:
        return build(node, trust)
    except (ValueError, TypeError, OSError) as error:
        raise _mistake(error, node, tuple(name.split("."))) from error


def _mistake(error: Exception, node: Any, at: Key) -> ConfigError:
    """An exception as a mistake in one of the values that its sentence names (at the root in full), or else in the node."""
    words = re.findall(r"\w+" if at else r"[\w.]+", str(error))
    values = [key for key, value in places(node, at) if not isinstance(value, dict)]
    named = [key for key in values if (str(key[-1]) if at else dotted(key)) in words]
    return MistakeError(at or named[0], str(error), suspects=named) if at or named else ConfigError(str(error))
