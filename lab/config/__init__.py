"""The configuration: compose it from words, check it, build what it describes, say where a value comes from, compare two of them.

    argv -> overrides.py (Hydra's grammar) -> layers.py (the files that Hydra's defaults lists choose, and the words) -> composition.py
    (merged, and ${...} resolved) -> validation.py (against the signatures of what it names) -> targets.py (the objects)

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

_HOME = {
    "Composed": "composition",
    "ConfigError": "errors",
    "MistakeError": "errors",
    "build": "targets",
    "check": "validation",
    "check_late": "validation",
    "compose": "composition",
    "config_hash": "identity",
    "explain": "explanation",
    "first_difference": "identity",
    "override": "composition",
    "resolve": "interpolation",
}
__all__ = [
    "Composed",
    "ConfigError",
    "MistakeError",
    "build",
    "check",
    "check_late",
    "compose",
    "config_hash",
    "explain",
    "first_difference",
    "override",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
