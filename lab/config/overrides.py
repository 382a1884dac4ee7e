"""The words of a command line, in Hydra's grammar: group=option, group@package=option, key=value, +key=value, ++key=value, ~key;
and --config=FILE, an experiment by its file.

The signs + and ++ are accepted and mean nothing: whether a key exists is for the check to say, with the nearest valid name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lab.config import files
from lab.config.errors import ConfigError, hint
from lab.config.tree import Key, leaves

SHELL = "command line"
OPTIONAL = ("callbacks", "logger")  # groups that a config can do without
KEY = re.compile(r"(\+{1,2}|~)?\w[\w/-]*(\.[\w-]+)*(@[\w-]+(\.[\w-]+)*)?")


@dataclass(frozen=True)
class Request:
    """What a command line asks for: options to choose, then values to set in order."""

    options: files.Options
    choices: dict[str, str]
    values: list[Override]


def read(words: list[str]) -> Request:
    """Tells choices from values; ConfigError for what cannot be read and for an option that does not exist.

    `model={d_model: 8}` is a value: it is merged into the node.
    """
    options = files.options()
    choices: dict[str, str] = {}
    values: list[Override] = []
    for word in words:
        if word.startswith("--config="):
            file = Path(word.removeprefix("--config="))
            files.load(file)
            key, option = "experiment", files.experiment_name(file)
            options["experiment"][option] = [file]
        else:
            override = parse(word)
            is_group = override.package is not None or override.key_or_group in options
            if not is_group or isinstance(override.value(), dict) or (override.is_delete() and override.package is None):
                values.append(override)
                continue
            key, option = _choice(override, options)
        if key == "experiment" and choices.get(key, option) != option:
            raise ConfigError(f"experiment ({SHELL}): two are given, {choices[key]} and {option}; keep one")
        choices[key] = option
    return Request(options, choices, values)


def places_of(override: Override) -> list[Key]:
    """The places that a value sets: of a dict, which is merged into what is there, those of its values."""
    return [key for key, _ in leaves(override.value(), tuple(override.key_or_group.split(".")))]


def _choice(override: Override, options: files.Options) -> tuple[str, str]:
    group, option = override.key_or_group, override.value()
    key = group if override.package is None else f"{group}@{override.package}"
    if override.is_delete() or not isinstance(option, str):
        names = ", ".join(sorted(options.get(group, ())))
        without = f"; ~{key} goes without" if key in OPTIONAL and option is None else ""
        raise ConfigError(f"{override.input_line} ({SHELL}): {key} takes the name of one option: {names}{without}")
    if group == "experiment" and option.endswith((".yaml", ".yml")):
        raise ConfigError(f"experiment={option} ({SHELL}): a file is given by --config {option}")
    files.option_file(options, group, option, SHELL, key)
    return key, option


def parse(text: str, sweep: bool = False) -> Override:
    """One override; ConfigError where the grammar cannot read it, for what only Hydra's own main could use, and, but for a sweep, for
    several values."""
    key, equals, value = text.partition("=")
    if not equals and not key.startswith("~"):
        file = f"; a file is given by --config {text}" if text.endswith((".yaml", ".yml")) else ", such as optimizer.lr=1e-3"
        raise ConfigError(f"{text} ({SHELL}): expected key=value{file}")
    if not KEY.fullmatch(key):
        raise ConfigError(f"{text} ({SHELL}): {key!r} is not a key; expected key=value, such as optimizer.lr=1e-3")
    how = f"a list is '{key}=[1,2]' and a text \"{key}='a,b'\", quoted for the shell"
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        raise ConfigError(f"{key} ({SHELL}): cannot read the value {value}; {how}") from None
    if override.is_sweep_override() and not sweep:
        raise ConfigError(f"{key} ({SHELL}): {value} is several values, which -m trains one by one; {how}")
    if re.match(r"hydra\b", override.key_or_group):
        raise ConfigError(f"{key} ({SHELL}): Hydra's own settings have no effect here; run_dir=PATH names the folder of a run")
    return override


def quote(text: str) -> str:
    """A text as one value of the grammar."""
    return "'" + text.replace("'", "\\'") + "'"


def set_value(config: DictConfig, override: Override) -> None:
    """Sets, merges or deletes one value in place, adding keys where they are missing."""
    key, value = override.key_or_group, override.value()
    if not override.is_delete():
        try:
            OmegaConf.update(config, key, value, merge=True, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError):
            raise ConfigError(f"{key} ({SHELL}): there is no such place in the config; set the whole list or node") from None
        return
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig) or name not in node:
        names = map(str, node) if isinstance(node, DictConfig) else ()
        raise ConfigError(f"~{key} ({SHELL}): there is no such key to delete{hint(name, names)}")
    if value is not None and node[name] != value:
        raise ConfigError(f"~{key} ({SHELL}): its value is {node[name]}, not {value}; ~{key} deletes any value")
    del node[name]
