"""From a node to the object it describes; and which nodes a config that we did not write may contain."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterable
from pathlib import Path as File
from types import ModuleType
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from lab.config.errors import ConfigError, MistakeError, hint
from lab.config.interpolation import resolve
from lab.config.tree import dotted, places

HOMES = ("lab.models", "lab.mixers", "lab.layers", "lab.tasks", "lab.training")
"""Where a class must be defined to be built from a config that someone else may have written."""

ALSO_SAFE = frozenset(
    f"pytorch_lightning.callbacks.{name}"
    for name in ("DeviceStatsMonitor", "EarlyStopping", "LearningRateMonitor", "RichModelSummary", "RichProgressBar", "TQDMProgressBar")
)
"""Classes of others that do no harm whatever their arguments."""


def build(node: Any, trust: list[str] | None = None) -> Any:
    """The object of a node and of the nodes in it. What a constructor raises comes through unchanged.

    trust: None allows any `_target_`: for a config that the user typed. A list: a config that was loaded, which may come from anywhere.
    Then a `_target_` must be a class of lab, or start with one of these prefixes. ConfigError otherwise, before anything is imported.
    """
    node = resolve(node)  # once: a text that would resolve again is refused
    if trust is not None:
        refuse_untrusted(node, trust)
    for target in _targets(node):
        locate(target)
    try:
        return instantiate(node, _convert_="all") if isinstance(node, dict | list) else node
    except InstantiationException as error:
        cause: BaseException | None = error
        while isinstance(cause, InstantiationException):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise ConfigError(f"{', '.join(_targets(node))}: Hydra refuses to call this from a config") from error


def refuse_untrusted(config: Any, trust: list[str]) -> None:
    """ConfigError for a `_target_` anywhere in the config that is neither a class of lab nor trusted. Imports nothing but lab."""
    for path, target in places(config):
        if path[-1] == "_target_" and not _is_allowed(target, trust):
            prefix = str(target).partition(".")[0]
            right = f"of lab only the classes of {', '.join(HOMES)}" if prefix == "lab" else f"if you trust it, add --trust {prefix}"
            raise ConfigError(f"{dotted(path)}: a config that was loaded may not call {target}; {right}")


def own_backend(op: str, name: str, trust: list[str] | None) -> Any:
    """The `lab.ops.backend.Backend` that `ops.OP=module.NAME` means. trust: as for `build`. MistakeError where it is none."""
    from lab.ops.backend import Backend  # imports torch

    key = ("ops", op)
    if trust is not None and not _has_prefix(name, trust):
        raise MistakeError(key, f"a config that was loaded may not import {name}; if you trust it, add --trust {name.partition('.')[0]}")
    try:
        found = locate(name)
    except ConfigError as error:
        raise MistakeError(key, str(error)) from None
    if not isinstance(found, Backend):
        raise MistakeError(key, f"{name} must be a lab.ops.backend.Backend; it is of type {type(found).__name__}")
    return found


def _is_allowed(target: Any, trust: list[str]) -> bool:
    """Of lab: by where the class is defined, not by the path that leads to it, as lab.config.files.yaml.Loader would."""
    if not isinstance(target, str):
        return False
    if target in ALSO_SAFE or _has_prefix(target, trust):
        return True
    if not target.startswith("lab."):
        return False
    found = locate(target)
    return isinstance(found, type) and _has_prefix(found.__module__, HOMES)


def _has_prefix(name: str, prefixes: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{prefix.rstrip('.')}.") for prefix in prefixes)


def _targets(node: Any) -> list[str]:
    return [target for path, target in places(node) if path[-1] == "_target_"]


def locate(target: Any) -> Any:
    """What a `_target_` names, imported. The current folder is searched too, after everything that is installed.

    ConfigError if there is no such thing, with the nearest name, or if its module fails.
    """
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise ConfigError(f"{target!r} is not the dotted name of a class or function")
    here = str(File.cwd())
    if here not in sys.path:
        sys.path.append(here)
    first, *rest = target.split(".")
    found = _import(first, target)
    if found is None:
        mine = [module.name for module in pkgutil.iter_modules([here])]
        raise ConfigError(f"there is no module {first}{hint(first, ['lab', *mine], 'modules here')}")
    name = first
    for part in rest:
        inner = _attribute(found, part, target)
        if inner is None and isinstance(found, ModuleType):
            inner = _import(f"{name}.{part}", target)
        if inner is None:
            raise ConfigError(f"{name} has no {part}{hint(part, _names(found), f'{name} has')}")
        name, found = f"{name}.{part}", inner
    return found


def _import(module: str, target: str) -> ModuleType | None:
    """None where there is no such module; ConfigError where its own code fails."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return None
        raise ConfigError(f"{target} cannot be imported: {error}") from error
    except Exception as error:
        raise ConfigError(f"{target} cannot be imported: {type(error).__name__}: {error}") from error


def _attribute(owner: Any, name: str, target: str) -> Any:
    try:
        return getattr(owner, name, None)
    except Exception as error:  # of a lazy module's import
        raise ConfigError(f"{target} cannot be imported: {type(error).__name__}: {error}") from error


def _names(owner: Any) -> list[str]:
    """What could have been meant: public classes and functions, and sub-modules."""
    names = [name for name in dir(owner) if not name.startswith("_") and name[0].isalpha()]
    inner = [module.name for module in pkgutil.iter_modules(getattr(owner, "__path__", []))]
    if isinstance(owner, ModuleType):
        names = [name for name in names if name not in vars(owner) or callable(vars(owner)[name])]
    return sorted({*names, *inner})
