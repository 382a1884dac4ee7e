"""From the words of a command line to one plain, resolved config. Nothing here imports torch; validation.py says what is right."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from lab.config import layers
from lab.config.errors import ConfigError, hint, nearest
from lab.config.interpolation import resolve_and_store
from lab.config.layers import Layer
from lab.config.overrides import SHELL, Request, read, set_value
from lab.config.tree import misplaced

SOLVER = "lab.training.matching"  # of `match`; imports torch


@dataclass(frozen=True)
class Composed:
    """A composed config, not yet checked."""

    config: dict[str, Any]  # plain and fully resolved
    stored: dict[str, Any]  # the same, but what the environment gave stays the text ${oc.env:NAME}: no secret reaches a disk
    choices: dict[str, str]  # group -> option: {"model": "lot", "mixer@model.mixer": "lattice", "experiment": "none", ...}
    overrides: list[str]  # the words it was composed from
    layers: list[Layer]  # the files and words, lowest first; merged they give the config

    def saying_where(self) -> AbstractContextManager[None]:
        """A MistakeError about this config, raised within this block, says where the mistake was made."""
        return layers.saying_where(self.layers)


def compose(overrides: list[str], matching: bool = True) -> Composed:
    """The config of these words (overrides.py has the grammar), with the value that its `match` solves, for which torch is imported.

    Raises ConfigError; names and types are left to `check`. matching: False leaves `match` unsolved.
    """
    request = read(overrides)
    of_files, choices = layers.of_files(request)
    merged = _merged(of_files, choices, request)
    made_of = [*of_files, *map(layers.of_word, request.values)]
    composed = _resolved(merged, made_of, choices, overrides)
    if not matching or composed.config.get("match") is None:
        return composed

    def model_at(knob: str, value: int) -> Any:
        OmegaConf.update(merged, knob, value)
        return OmegaConf.to_container(merged.model, resolve=True)

    with composed.saying_where():
        solved = import_module(SOLVER).solve(composed, model_at)
    merged.merge_with(solved.tree)
    return _resolved(merged, [*made_of, solved], choices, overrides)


def override(stored: dict[str, Any], overrides: list[str], file: Path, choices: dict[str, str]) -> Composed:
    """The config that a run stored in `file`, with values of a command line. ConfigError for a choice: a run keeps its model and task."""
    request = read(overrides)
    for key, option in request.choices.items():
        raise ConfigError(f"{key}={option} ({SHELL}): a run keeps its own {key}; only values can be set, such as {key}.KEY=VALUE")
    of_run = [layers.of_stored(file, stored)]
    made_of = [*of_run, *map(layers.of_word, request.values)]
    return _resolved(_merged(of_run, choices, request), made_of, choices, overrides)


def _merged(of_files: list[Layer], choices: dict[str, str], request: Request) -> DictConfig:
    config = OmegaConf.merge(*(layer.tree for layer in of_files))
    assert isinstance(config, DictConfig)
    for value in request.values:
        _expect_root_key(config, value, choices)
        set_value(config, value)
    return config


def _resolved(config: DictConfig, made_of: list[Layer], choices: dict[str, str], overrides: list[str]) -> Composed:
    with layers.saying_where(made_of):
        used, stored = resolve_and_store(config)
    return Composed(used, stored, choices, list(overrides), made_of)


def _expect_root_key(config: DictConfig, value: Override, chosen: dict[str, str]) -> None:
    """Needs no import, and comes before a group with a mistyped name would be taken for a new key."""
    key = value.key_or_group
    root = key.partition(".")[0]
    if root in config:
        return
    plain: Any = OmegaConf.to_container(config, resolve=False)
    names = sorted({*map(str, plain), *chosen})
    near = nearest(root, names)
    rest = key.removeprefix(root) if near in plain else ""
    right = f"; did you mean {near}{rest}?" if near else misplaced((root,), plain) or hint(root, names)
    raise ConfigError(f"{key} ({SHELL}): there is no such key{right}")
