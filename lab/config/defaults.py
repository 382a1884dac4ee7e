"""Which files a config is made of: Hydra reads the defaults lists in them. What it cannot make sense of is one sentence here.

https://hydra.cc/docs/advanced/defaults_list/ has their grammar.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.default_element import GroupDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource

from lab.config import files
from lab.config.errors import ConfigError, nearest
from lab.config.overrides import SHELL, Request, quote

PRIMARY = "train"  # configs/train.yaml
COMPARISON = ("models", "seeds", "pairs", "expect")
"""What an experiment that has `models` says to lab-compare alone; lab-train does not see it."""


def choose(request: Request) -> tuple[list[tuple[Path, tuple[str, ...], Any]], dict[str, str]]:
    """The files in the order in which they are merged, each with the package it is merged at and its content; and group -> option."""
    version.setbase("1.3")
    library = Library(request.options)
    overrides = OverridesParser.create().parse_overrides([f"{key}={quote(option)}" for key, option in request.choices.items()])
    try:
        result = create_defaults_list(library, PRIMARY, overrides, prepend_hydra=False, skip_missing=False)
    except (HydraException, ValueError, RecursionError) as error:
        raise library.explained(request, " ".join(str(error).split())) from error
    chosen = []
    for one in result.defaults:
        loaded = library.loaded[str(one.config_path)]
        package = tuple(name for name in (one.package or "").split(".") if name not in ("", "_global_"))
        chosen.append((Path(loaded.path), package, loaded.config))
    return chosen, {key: option for key, option in result.overrides.known_choices.items() if isinstance(option, str)}


class Library(ConfigRepository):
    """Our YAML files as Hydra's defaults lists see them."""

    def __init__(self, options: files.Options) -> None:  # not that of the base, which looks for folders
        self.options, self.sources = options, []
        self.loaded: dict[str, ConfigResult] = {}  # by Hydra's name for a file: model/lot

    def config_exists(self, config_path: str) -> bool:
        return self.load_config(config_path) is not None

    def group_exists(self, config_path: str) -> bool:
        return config_path in self.options

    def load_config(self, config_path: str) -> ConfigResult | None:
        """One file and its defaults list; None where an `optional` line asks for a file that there is not."""
        if config_path not in self.loaded:
            file = files.home() / "configs" / f"{PRIMARY}.yaml"
            if config_path != PRIMARY:
                group, _, option = config_path.partition("/")
                where, asked = self._line(group, option)
                if asked is not None and asked.is_optional() and option not in self.options.get(group, ()):
                    return None
                file = files.option_file(self.options, group, option, where, _key(asked) or None)
            self.loaded[config_path] = self._load(config_path, file)
        return self.loaded[config_path]

    def _load(self, name: str, file: Path) -> ConfigResult:
        config, text, where = files.load(file), file.read_text(encoding="utf-8"), files.show(file)
        try:
            header = ConfigSource._get_header_dict(text)
            lines = self._create_defaults_list(name, self._extract_defaults_list(name, config))
        except (ValueError, AssertionError) as error:
            reason = str(error).partition("\n")[0] or "it cannot be read"
            raise ConfigError(f"defaults ({where}): {reason}; a line is of the form `override /model: lot`") from None
        if name.startswith("experiment/"):
            header["package"] = "_global_"  # whatever it says
            for key in COMPARISON if "models" in config else ():
                config.pop(key, None)
        elif header["package"] is None and re.search(r"(?m)^\s*#\s*@package\b", text):
            raise ConfigError(f"{where}: `# @package ...` must be the first line")
        for line in lines:
            if name != PRIMARY and isinstance(line, GroupDefault) and line.group in self.options:  # would be a group inside of this one
                raise ConfigError(f"{line.group}: {line.value} ({where}): write `override /{_key(line)}: {line.value}`, with the slash")
        if (overrides := [line.is_override() for line in lines]) != sorted(overrides):
            raise ConfigError(f"defaults ({where}): lines with `override` must come last")
        return ConfigResult("lab", str(file), config, header, lines)

    def _line(self, group: str, option: str) -> tuple[str, Any]:
        """The file, and the line of its defaults list, that asks for an option; the command line where no file does."""
        for where, line in self._lines():
            name = line.value if isinstance(line, GroupDefault) else line.path
            if f"/{name}".endswith(f"/{option}") and _key(line).partition("@")[0] in (group, ""):
                return where, line
        return SHELL, None

    def _lines(self) -> list[tuple[str, Any]]:
        return [(files.show(Path(result.path)), line) for result in self.loaded.values() for line in result.defaults_list or ()]

    def explained(self, request: Request, message: str) -> ConfigError:
        """Hydra's message about lines that do not go together, in our words."""
        if unknown := re.search(r"Could not override '(.+?)'(?:.*Did you mean to override (?:one of )?(.+?)[,?])?", message):
            key = unknown[1]
            near = unknown[2] or nearest(key, [_key(line) for _, line in self._lines() if not line.is_override()])
            if (option := request.choices.get(key)) is not None:
                end = f"no defaults list has {key}" + (
                    f"; did you mean {near}={option}?" if near else ": nothing that is chosen has a place for it"
                )
                return ConfigError(f"{key}={option} ({SHELL}): {end}")
            for where, line in self._lines():
                if _key(line) == key and line.is_override():
                    end = f"no defaults list has {key} to override" + (f"; did you mean {near}?" if near else "")
                    return ConfigError(f"override /{key}: {line.value} ({where}): {end}")
        if twice := re.search(r"Multiple values for (\S+?)\.|(\S+) appears more than once", message):
            key = twice[1] or twice[2]
            for where, line in reversed(self._lines()):  # the primary config is the first
                if _key(line) == key and not line.is_override():
                    text = f"/{key}: {line.value}"
                    return ConfigError(f"{text} ({where}): write `override {text}`, the defaults have one already")
        words = " ".join(f"{key}={option}" for key, option in request.choices.items()) or "configs/train.yaml"
        return ConfigError(f"the defaults lists of {words} do not compose: {message}")


def _key(line: Any) -> str:
    """mixer@model.mixer, as the line has it; "" for one that names no group."""
    if not isinstance(line, GroupDefault):
        return ""
    return str(line.group).removeprefix("/") + (f"@{line.package}" if line.package else "")
