"""The one exception of the configuration, and the words that its sentences share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lab.config.tree import Key, dotted


class ConfigError(Exception):
    """A mistake in the configuration: one sentence with the key, where it was set, and what would be right."""


class MistakeError(Exception):
    """A mistake at a place in a config, before anyone looked up where it was set. Becomes a ConfigError.

    `culprit` is the place whose origin is told, where that is another one: for a missing key, the node that misses it.
    """

    def __init__(self, key: Key, problem: str, culprit: Key | None = None) -> None:
        super().__init__(f"{dotted(key)}: {problem}")
        self.key, self.problem, self.culprit = key, problem, culprit or key

    def at(self, origin: str | None) -> ConfigError:
        return ConfigError(f"{dotted(self.key)} ({origin}): {self.problem}" if origin else str(self))


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` was probably meant to be."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return close[0] if close else None


def hint(name: str, valid: Iterable[str], what: str = "valid") -> str:
    """The end of a sentence about an unknown name: the nearest valid one, else all of them if they are few."""
    valid = sorted(valid)
    close = nearest(name, valid)
    if close is not None:
        return f"; did you mean {close}?"
    return f"; {what}: {', '.join(valid)}" if 0 < len(valid) <= 30 else ""
