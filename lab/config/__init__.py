"""The configuration: compose it from words, check it, build what it describes, say where a value comes from, compare two of them."""

from lab.config.composition import Composed, compose, override, resolve
from lab.config.errors import ConfigError
from lab.config.explanation import explain
from lab.config.identity import config_hash, first_difference
from lab.config.targets import build
from lab.config.validation import check, check_late

__all__ = [
    "Composed",
    "ConfigError",
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
