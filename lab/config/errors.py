"""The exceptions of the configuration, and the words that its sentences share. Imports neither torch nor Hydra."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from lab.config.tree import Key, dotted


class ConfigError(Exception):
    """A mistake in the configuration: one sentence with the key, where it was set, and what would be right."""


class MistakeError(ConfigError):
    """A mistake at a place in a config, told without where it was set: `Composed.saying_where` adds that.

    culprit: the place whose origin is told, where that is not `key`: for a missing key, the node that misses it.
    suspects: the places that could be meant, where nobody knows which; the one that was set last is told.
    """

    def __init__(self, key: Key, problem: str, culprit: Key | None = None, suspects: Sequence[Key] = ()) -> None:
        self.key, self.problem, self.culprit, self.suspects = key, problem, culprit or key, suspects
        super().__init__(_sentence(key, "", problem))

    def at(self, key: Key, origin: str) -> ConfigError:
        return ConfigError(_sentence(key, f" ({origin})", self.problem))


def _sentence(key: Key, where: str, problem: str) -> str:
    """key (where): problem; a problem that begins with the key says it once."""
    name = dotted(key)
    if problem.startswith(f"{name} ") or (not where and problem.startswith(f"{name}.")):
        return name + where + problem.removeprefix(name)
    return f"{name}{where}: {problem}"


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
