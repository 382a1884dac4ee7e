"""The layers that a config is made of: each file and each word of the command line, in the order in which they are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from lab.config import files
from lab.config.choices import chosen_files
from lab.config.overrides import SHELL, Request, read, set_value
from lab.config.tree import Key, lookup

DELETED = "(deleted)"


class Layer(NamedTuple):
    name: str  # configs/model/lot.yaml, or "command line"
    tree: dict[str, Any]  # what it sets, unresolved
    lines: dict[Key, int]  # where in the file

    def where(self, key: Key) -> str:
        key = tuple(map(str, key))
        return f"{self.name}:{self.lines[key]}" if key in self.lines else self.name


def layers(overrides: list[str]) -> list[Layer]:
    """Lowest first. Merged in this order they give the config that `compose` resolves."""
    request = read(overrides)
    return _files(request) + _words(request)


def origin(overrides: list[str], key: Key) -> str:
    """Where the value at `key` comes from: the last layer that sets it, or else the one that sets the node around it."""
    request = read(overrides)
    made_of = _words(request)
    if not any(lookup(layer.tree, key) for layer in made_of):  # a word wins over the files, which take a while to find
        made_of = _files(request) + made_of
    while key:
        for layer in reversed(made_of):
            if lookup(layer.tree, key):
                return layer.where(key)
        key = key[:-1]
    return SHELL


def _files(request: Request) -> list[Layer]:
    return [_of_file(file, package) for file, package in chosen_files(request)]


def _words(request: Request) -> list[Layer]:
    return [_of_override(override) for override in request.values]


def _of_file(file: Path, package: str) -> Layer:
    tree: Any = OmegaConf.to_container(files.load(file), resolve=False)
    tree.pop("defaults", None)
    names = [name for name in package.split(".") if name and name != "_global_"]
    for name in reversed(names):
        tree = {name: tree}
    top = files.parse(file.read_text(encoding="utf-8"))
    return Layer(files.show(file), tree, dict(_lines(top, tuple(names))))


def _lines(node: yaml.Node | None, at: Key) -> list[tuple[Key, int]]:
    found: list[tuple[Key, int]] = []
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = (*at, str(name.value))
            found += [(key, name.start_mark.line + 1), *_lines(value, key)]
    if isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            key = (*at, str(index))
            found += [(key, value.start_mark.line + 1), *_lines(value, key)]
    return found


def _of_override(override: Override) -> Layer:
    config = OmegaConf.create()
    if override.is_delete():
        OmegaConf.update(config, override.key_or_group, DELETED, force_add=True)
    else:
        set_value(config, override)
    tree: Any = OmegaConf.to_container(config, resolve=False)
    return Layer(SHELL, tree, {})
