"""The configuration: compose it from words, check it, build what it describes, say where a value comes from, compare two of them.

    words     overrides.py     Hydra's grammar: options to choose, values to set
    files     defaults.py      those that Hydra's defaults lists choose among files.py's
    layers    layers.py        the trees of both, lowest first; a mistake at a key is told with the layer that set it
    config    composition.py   the layers merged, each ${...} resolved by interpolation.py
    checked   validation.py    against the signatures of what it names, in the words of annotations.py
    objects   targets.py       and which ones a loaded config may name

The names are lazy: an error, or a list of the options, does not take the time to import Hydra.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lab.config.composition import Composed, compose, override
    from lab.config.errors import ConfigError, MistakeError
    from lab.config.explanation import explain
    from lab.config.identity import config_hash, first_difference
    from lab.config.interpolation import resolve
    from lab.config.targets import build
    from lab.config.validation import check, check_late

__all__ = [
    "Composed", "ConfigError", "MistakeError", "build", "check", "check_late", "compose", "config_hash", "explain", "first_difference",
    "override", "resolve",
]  # fmt: skip
_HOME = {
    "ConfigError": "errors", "MistakeError": "errors", "config_hash": "identity", "first_difference": "identity", "explain": "explanation",
    "Composed": "composition", "compose": "composition", "override": "composition", "resolve": "interpolation",
    "build": "targets", "check": "validation", "check_late": "validation",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
