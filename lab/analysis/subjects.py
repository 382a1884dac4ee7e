"""Which models lab-doctor looks at: an option of configs/model by its name, or a class of yours by its dotted path, made small.

    subject, = subjects(["mamba"], ["model.d_model=16"], vocab_size=11, length=64, sizes={"d_model": 32, "n_layers": 2})
    model = subject.make()          # afresh each time, with the same weights

A Mixer is put into a Stack without positions; a SequenceModel, or what a function returns, is built as it is. What is typed on the command
line may call anything (lab/config/targets.py).
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf

from lab.config import ConfigError, check, compose
from lab.config.errors import hint
from lab.config.files import options
from lab.config.interpolation import resolve
from lab.config.overrides import SHELL, parse, set_value
from lab.config.targets import locate
from lab.mixers import Mixer
from lab.models import SequenceModel, initialise
from lab.training.experiment import build_node

LAB = Path(__file__).resolve().parents[1]
OFFERED = ("d_model", "layer", "position")  # what a Stack gives a mixer besides its own arguments
LENGTHS = ("max_len", "max_seq_len", "seq_len")  # arguments that limit how long a sequence may be


class Subject(NamedTuple):
    name: str
    node: dict[str, Any]  # of the config: what is built

    def make(self) -> SequenceModel:
        """ConfigError for what a constructor refuses, and for what is no model of tokens."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for what has no reset_parameters
            try:
                model = build_node("model", self.node, None)
            except ConfigError:
                raise
            except Exception as error:  # of someone's own constructor: whatever it is, it is what they want to know
                raise ConfigError(f"{self.name} cannot be built: {told(error)}") from error
        if not isinstance(model, SequenceModel):
            raise ConfigError(f"{self.name} makes a {type(model).__name__}, and lab-doctor looks at a lab.models.SequenceModel")
        if self.node.get("vocab_size", 0) is None:
            raise ConfigError(f"{self.name} has no vocabulary, and the checks are of tokens; give model.vocab_size=11 or so")
        initialise(model, 0)
        return model


def subjects(names: Sequence[str], words: Sequence[str], vocab_size: int, length: int, sizes: Mapping[str, int]) -> list[Subject]:
    """words: of the command line, and the same for all. length: tokens that a sequence may have. sizes: where a model has such arguments
    and the words say nothing else. ConfigError for a name or word that means nothing, in one sentence."""
    if twice := next((name for name in names if list(names).count(name) > 1), None):
        raise ConfigError(f"--model: {twice} is there twice")
    return [(_own if "." in name else _named)(name, words, vocab_size, length, sizes) for name in names]


def _named(name: str, words: Sequence[str], vocab_size: int, length: int, sizes: Mapping[str, int]) -> Subject:
    known = options().get("model", {})
    if name not in known:
        right = hint(name, known)
        raise ConfigError(f"--model {name}: configs/model has no such file{right or '; a class of yours is a dotted path, mymodels.Mine'}")
    first = [f"model={name}", f"task.vocab_size={vocab_size}", f"task.seq_len={length}"]
    node = compose([*first, *words]).config["model"]
    wanted = {**sizes, **_one_period(node)} if isinstance(node, dict) else {}
    small = [f"model.{key}={value}" for key, value in wanted.items() if key in node]
    composed = compose([*first, *small, *words])
    check(composed)
    subject = Subject(name, composed.config["model"])
    with composed.saying_where():
        subject.make()
    return subject


def _one_period(node: Mapping[str, Any]) -> dict[str, int]:
    """The fewest layers that a model has whose layers differ."""
    of = node.get("pattern") or (node["mixer"] if isinstance(node.get("mixer"), list) else None)
    return {"n_layers": len(of)} if of else {}


def _own(target: str, words: Sequence[str], vocab_size: int, length: int, sizes: Mapping[str, int]) -> Subject:
    found = locate(target)
    if not callable(found):
        raise ConfigError(f"{target} is a {type(found).__name__}; --model takes a Mixer, a SequenceModel, or a function that makes one")
    if isinstance(found, type) and not issubclass(found, Mixer | SequenceModel):
        raise ConfigError(
            f"{target} is neither a lab.mixers.Mixer nor a lab.models.SequenceModel; docs/extending.md shows how a mixer is written"
        )
    is_mixer = isinstance(found, type) and issubclass(found, Mixer)
    node: dict[str, Any]
    if is_mixer:
        inside = {"_target_": target, "_partial_": True}
        node = {"_target_": "lab.models.Stack", "vocab_size": vocab_size, **sizes, "position": "none", "max_len": length, "mixer": inside}
    else:
        offered = {"vocab_size": vocab_size, **sizes, **dict.fromkeys(LENGTHS, length)}
        taken = inspect.signature(found).parameters
        node = {"_target_": target, **{key: value for key, value in offered.items() if key in taken}}
    config = OmegaConf.create({"model": node})
    for word in words:
        override = parse(word)
        if not override.key_or_group.startswith("model."):
            raise ConfigError(f"{override.key_or_group} ({SHELL}): {target} has no task or trainer here; its words are model.KEY=VALUE")
        set_value(config, override)
    tree = resolve(OmegaConf.to_container(config))
    check(tree, _root)
    if is_mixer:
        _check_complete(target, found, tree["model"].get("mixer", {}))
    subject = Subject(target, tree["model"])
    subject.make()
    return subject


def _root(model: SequenceModel) -> None:
    """The root of the config that `_own` makes."""


def _check_complete(target: str, found: type, given: Mapping[str, Any]) -> None:
    """ConfigError for an argument without a default that nobody gives: a partial node may lack any."""
    for name, parameter in inspect.signature(found).parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and name not in OFFERED and name not in given:
            raise ConfigError(f"model.mixer.{name}: {target} needs it; add model.mixer.{name}=VALUE")
    if given.get("_target_") == target and "d_model" not in inspect.signature(found).parameters:
        raise ConfigError(f"{target}: a mixer takes d_model, the width of the Stack around it")


def told(error: BaseException) -> str:
    """An exception in one line, with the place in the code that is neither torch's nor lab's, if it went through such code."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not Path(frame.filename).resolve().is_relative_to(LAB) and "site-packages" not in frame.filename]
    frame = next((frame for frame in reversed(theirs) if not frame.filename.startswith("<")), frames[-1] if frames else None)
    place = f" ({Path(frame.filename).name}:{frame.lineno})" if frame else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
