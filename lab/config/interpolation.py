"""What ${...} stands for: the value that is used, and what is stored instead where the environment gave it.

A value that ${oc.env:NAME} had a part in is stored as it was written, so that no secret reaches a disk; all others as what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException, UnsupportedInterpolationType
from omegaconf.resolvers import oc

from lab.config.errors import MistakeError, hint
from lab.config.tree import Key, dotted, lookup, places

NO_TEXT = "neither a key nor a resolved value can contain the text ${"
RESOLVERS = ("oc.env", "oc.decode", "oc.create", "oc.select", "oc.dict.keys", "oc.dict.values")


def resolve(config: Any) -> Any:
    """Plain containers, with the values of today's environment. Raises MistakeError."""
    return resolve_and_store(config)[0]


def resolve_and_store(config: Any) -> tuple[Any, Any]:
    """(as it is used, as it is stored), both plain containers. Raises MistakeError for the first ${...} that has no value."""
    if not isinstance(config, dict | list) and not OmegaConf.is_config(config):
        return config, config
    node = config if OmegaConf.is_config(config) else OmegaConf.create(config)
    written: Any = OmegaConf.to_container(node, resolve=False)
    with _reading_the_environment() as reads:

        def both(parent: Any, name: Any, text: Any, key: Key) -> tuple[Any, Any]:
            if "${" in str(name):
                raise MistakeError(key, NO_TEXT)
            if isinstance(text, dict | list):
                return both_of(parent[name], text, key)
            if not isinstance(text, str) or "${" not in text:
                return text, text
            reads.clear()
            try:
                value = parent[name]
                value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            except OmegaConfBaseException as error:
                raise _without_value(written, key, text, error) from None
            if "${" in str(value):  # whoever reads it next would resolve it a second time
                raise MistakeError(key, NO_TEXT)
            return value, text if reads else value

        def both_of(parent: Any, tree: Any, key: Key) -> tuple[Any, Any]:
            items = tree.items() if isinstance(tree, dict) else enumerate(tree)
            pairs = {name: both(parent, name, text, (*key, name)) for name, text in items}
            used, stored = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
            return (used, stored) if isinstance(tree, dict) else (list(used.values()), list(stored.values()))

        return both_of(node, written, ())


@contextmanager
def _reading_the_environment() -> Iterator[list[Any]]:
    """A list that grows whenever a variable is read."""
    reads: list[Any] = []

    def env(*arguments: Any) -> Any:
        reads.append(arguments)
        return oc.env(*arguments)

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    try:
        yield reads
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _without_value(tree: Any, key: Key, text: str, error: OmegaConfBaseException) -> MistakeError:
    """Why the ${...} in the text at `key` has no value."""
    if isinstance(error, UnsupportedInterpolationType):
        name = re.search(r"\$\{([\w.]+):", text)
        return MistakeError(key, f"{text} uses an unknown resolver{hint(name[1] if name else '', RESOLVERS, 'the resolvers are')}")
    if variable := re.search(r"Environment variable '(.+?)' not found", str(error)):
        return MistakeError(key, f"{text} needs the environment variable {variable[1]}, which is not set")
    if "Recursive interpolation" in str(error):
        return MistakeError(key, f"{text} refers to itself")
    for reference in re.findall(r"\$\{([^${}:.][^${}:]*)\}", text):  # not the relative ones
        value = lookup(tree, tuple(re.findall(r"[^.\[\]]+", reference)))
        if value is None:
            return MistakeError(
                key, f"${{{reference}}} refers to a key that does not exist{hint(reference, map(dotted, dict(places(tree))))}"
            )
        if value == ("???",):
            return MistakeError(key, f"${{{reference}}} refers to a value that is missing; set {reference}=...")
    if isinstance(error, InterpolationToMissingValueError):
        return MistakeError(key, f"{text} refers to a value that is missing")
    return MistakeError(key, f"{text} cannot be resolved; the form is ${{group.key}}")
