"""From the words of a command line to one plain, resolved config. Nothing here imports torch; validation.py says what is right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException, UnsupportedInterpolationType
from omegaconf.resolvers import oc

from lab.config.choices import choose
from lab.config.errors import ConfigError, MistakeError, hint, nearest
from lab.config.layers import origin
from lab.config.overrides import SHELL, read, set_value
from lab.config.tree import dotted, lookup, map_texts, misplaced, places


@dataclass(frozen=True)
class Composed:
    """A composed config, not yet checked."""

    config: dict[str, Any]  # plain and fully resolved
    stored: dict[str, Any]  # the same, but what the environment gave stays the text ${oc.env:NAME}: no secret reaches a disk
    choices: dict[str, str]  # group -> option: {"model": "lot", "mixer@model.mixer": "lattice", "experiment": "none", ...}
    overrides: list[str]  # the words it was composed from


def compose(overrides: list[str]) -> Composed:
    """The config of these words (overrides.py has the grammar). Raises ConfigError; names and types are left to `check`."""
    request = read(overrides)
    config, chosen = choose(request)
    for value in request.values:
        _expect_root_key(config, value, chosen)
        set_value(config, value)
    try:
        return Composed(_plain(config), _plain_for_disk(config), chosen, list(overrides))
    except MistakeError as mistake:
        raise mistake.at(origin(overrides, mistake.culprit)) from None


def override(stored: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A run's stored config with values of a command line in it. ConfigError for a choice: a run keeps its model and its task."""
    request = read(overrides)
    for key, option in request.choices.items():
        raise ConfigError(f"{key}={option} ({SHELL}): a run keeps its own {key}; only values can be set, such as {key}.KEY=VALUE")
    config = OmegaConf.create(stored)
    for value in request.values:
        _expect_root_key(config, value, {})
        set_value(config, value)
    try:
        return _plain_for_disk(config)
    except MistakeError as mistake:
        raise mistake.at(None) from None


def resolve(stored: Any) -> Any:
    """A stored config, or a part of one, with the values of today's environment in it; ConfigError where one is missing."""
    try:
        return _plain(OmegaConf.create(stored))
    except MistakeError as mistake:
        raise mistake.at(None) from None


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


# ----------------------------------------------------------------------- interpolation

_MARK = "\0{"  # stands for ${ in a value that must not be resolved again


def _plain(config: Any) -> Any:
    """Plain containers with every ${...} resolved; raises MistakeError."""
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise _wrong_interpolation(config, error) from None
    for path, value in places(plain):
        if "${" in f"{path[-1]} {value if isinstance(value, str) else ''}":  # whoever reads it next would resolve it a second time
            raise MistakeError(path, "neither a key nor a resolved value can contain the text ${")
    return plain


def _plain_for_disk(config: Any) -> Any:
    """As `_plain`, but ${oc.env:NAME} stays as it is, wherever it is used. Only for a config that `_plain` accepted."""
    with _environment_as_text():
        try:
            plain = OmegaConf.to_container(config, resolve=True)
        except OmegaConfBaseException as error:
            raise _wrong_interpolation(config, error) from None
    return map_texts(lambda text: text.replace(_MARK, "${"), plain)


@contextmanager
def _environment_as_text() -> Iterator[None]:
    def text(name: str, *arguments: Any) -> str:
        return f"{_MARK}{name}:{','.join(map(_argument, arguments))}}}"

    def decode(expression: Any, _parent_: Any, _node_: Any) -> Any:
        if isinstance(expression, str) and _MARK in expression:
            return f"{_MARK}oc.decode:{expression}}}"
        return oc.decode(expression, _parent_, _node_)

    OmegaConf.register_new_resolver("oc.env", lambda *arguments: text("oc.env", *arguments), replace=True)
    OmegaConf.register_new_resolver("oc.decode", decode, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
        OmegaConf.register_new_resolver("oc.decode", oc.decode, replace=True)


def _argument(value: Any) -> str:
    """An argument of a resolver, as it is written."""
    if value is None:
        return "null"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_]\w*|" + re.escape(_MARK) + ".*", value):
        return "'" + value.replace("'", "\\'") + "'"
    return str(value)


def _wrong_interpolation(config: Any, error: OmegaConfBaseException) -> MistakeError:
    """What is wrong with the interpolation that OmegaConf could not resolve."""
    raw = OmegaConf.to_container(config, resolve=False)
    path = tuple(re.findall(r"[^.\[\]]+", str(error.full_key or error.key)))
    found = lookup(raw, path)
    text = str(found[0]) if found else ""
    if isinstance(error, UnsupportedInterpolationType):
        name = re.search(r"\$\{([\w.]+):", text)
        resolvers = ["oc.env", "oc.decode", "oc.create", "oc.select", "oc.dict.keys", "oc.dict.values"]
        return MistakeError(path, f"{text} uses an unknown resolver{hint(name[1] if name else '', resolvers, 'the resolvers are')}")
    for reference in re.findall(r"\$\{([^${}:]+)\}", text):
        target = tuple(re.findall(r"[^.\[\]]+", reference))
        value = None if reference.startswith(".") else lookup(raw, target)
        if value is None and not reference.startswith("."):
            names = [dotted(place) for place, _ in places(raw)]
            return MistakeError(path, f"${{{reference}}} refers to a key that does not exist{hint(reference, names)}")
        if value == ("???",):
            return MistakeError(path, f"${{{reference}}} refers to a value that is missing; set {reference}=...")
    if isinstance(error, InterpolationToMissingValueError):
        return MistakeError(path, f"{text} refers to a value that is missing")
    variable = re.search(r"Environment variable '(.+?)' not found", str(error))
    if variable:
        return MistakeError(path, f"{text} needs the environment variable {variable[1]}, which is not set")
    if "Recursive interpolation" in str(error):
        return MistakeError(path, f"{text} refers to itself")
    return MistakeError(path, f"{text} cannot be resolved; the form is ${{group.key}}")
