"""The layers of a config: the chosen files and the words of the command line, in the order in which they are merged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from lab.config import files
from lab.config.defaults import choose
from lab.config.errors import MistakeError
from lab.config.overrides import SHELL, Request, set_value
from lab.config.tree import Key, lookup

DELETED = "(deleted)"


class Layer(NamedTuple):
    name: str  # configs/model/lot.yaml, or "command line"
    tree: dict[str, Any]  # what it sets, unresolved
    lines: dict[Key, int]  # where in the file

    def where(self, key: Key) -> str:
        key = tuple(map(str, key))
        return f"{self.name}:{self.lines[key]}" if key in self.lines else self.name


def of_files(request: Request) -> tuple[list[Layer], dict[str, str]]:
    """The layers of the chosen files, lowest first; and group -> option. Raises ConfigError."""
    chosen, choices = choose(request)
    return [_of_file(*one) for one in chosen], choices


def _of_file(file: Path, package: tuple[str, ...], config: Any) -> Layer:
    """What a file sets, at the package that it is merged at. An empty one sets nothing, not an empty node."""
    tree = _plain(config)
    for name in reversed(package if tree else ()):
        tree = {name: tree}
    return Layer(files.show(file), tree, {(*package, *key): line for key, line in files.lines(file).items()})


def of_word(override: Override) -> Layer:
    config = OmegaConf.create()
    if override.is_delete():
        OmegaConf.update(config, override.key_or_group, DELETED, force_add=True)
    else:
        set_value(config, override)
    return Layer(SHELL, _plain(config), {})


def of_stored(file: Path, config: dict[str, Any]) -> Layer:
    """Of the config that a run stored in `file`: its config.yaml, or a checkpoint, which has no lines."""
    return Layer(files.show(file), config, files.lines(file) if file.suffix == ".yaml" else {})


def origin(layers: list[Layer], key: Key) -> str:
    """Where the value at `key` comes from: the last layer that sets it, or else the one that sets the node around it."""
    while key and (number := _last(layers, key)) < 0:
        key = key[:-1]
    return layers[number].where(key) if key else SHELL


def _last(layers: list[Layer], key: Key) -> int:
    """The number of the last layer that sets `key`; -1 for none."""
    return max((number for number, layer in enumerate(layers) if lookup(layer.tree, key)), default=-1)


@contextmanager
def saying_where(layers: list[Layer]) -> Iterator[None]:
    """A MistakeError about the config of these layers, raised within this block, says where the mistake was made."""
    try:
        yield
    except MistakeError as mistake:
        key = max(mistake.suspects, key=lambda key: _last(layers, key), default=mistake.key)
        culprit = key if mistake.suspects else mistake.culprit
        raise mistake.at(key, origin(layers, culprit)) from mistake.__cause__


def _plain(config: Any) -> dict[str, Any]:
    tree: Any = OmegaConf.to_container(config, resolve=False)
    return tree
