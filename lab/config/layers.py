"""The layers of a config: the chosen files and the words of the command line, in the order in which they are merged.

Which files are chosen, and in which order, the defaults lists in them say: Hydra reads those. What it cannot make sense of is said here
in one sentence with the file at fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra import version
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.default_element import GroupDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from lab.config import files
from lab.config.errors import ConfigError, MistakeError, nearest
from lab.config.overrides import SHELL, Request, quote, set_value
from lab.config.tree import Key, lookup

PRIMARY = "train"  # configs/train.yaml
DELETED = "(deleted)"


class Layer(NamedTuple):
    name: str  # configs/model/lot.yaml, or "command line"
    tree: dict[str, Any]  # what it sets, unresolved
    lines: dict[Key, int]  # where in the file

    def where(self, key: Key) -> str:
        key = tuple(map(str, key))
        return f"{self.name}:{self.lines[key]}" if key in self.lines else self.name


def of_files(request: Request) -> tuple[list[Layer], dict[str, str]]:
    """The layers of the chosen files, lowest first; and group -> option. Raises ConfigError."""
    version.setbase("1.3")
    library = Library(request.options)
    overrides = OverridesParser.create().parse_overrides([f"{key}={quote(option)}" for key, option in request.choices.items()])
    try:
        chosen = create_defaults_list(library, PRIMARY, overrides, prepend_hydra=False, skip_missing=False)
    except (HydraException, ValueError) as error:
        raise library.explained(request, " ".join(str(error).split())) from error
    options = {key: option for key, option in chosen.overrides.known_choices.items() if isinstance(option, str)}
    return [library.layer(str(default.config_path), default.package) for default in chosen.defaults], options


def of_word(override: Override) -> Layer:
    config = OmegaConf.create()
    if override.is_delete():
        OmegaConf.update(config, override.key_or_group, DELETED, force_add=True)
    else:
        set_value(config, override)
    return Layer(SHELL, _plain(config), {})


def of_stored(file: Path, config: dict[str, Any]) -> Layer:
    """Of the config that a run stored in `file`: its config.yaml, or a checkpoint, which has no lines."""
    return Layer(files.show(file), config, files.lines(file) if file.suffix == ".yaml" else {})


def origin(layers: list[Layer], key: Key) -> str:
    """Where the value at `key` comes from: the last layer that sets it, or else the one that sets the node around it."""
    while key and (number := _last(layers, key)) < 0:
        key = key[:-1]
    return layers[number].where(key) if key else SHELL


def _last(layers: list[Layer], key: Key) -> int:
    """The number of the last layer that sets `key`; -1 for none."""
    return max((number for number, layer in enumerate(layers) if lookup(layer.tree, key)), default=-1)


@contextmanager
def saying_where(layers: list[Layer]) -> Iterator[None]:
    """A MistakeError about the config of these layers, raised within this block, says where the mistake was made."""
    try:
        yield
    except MistakeError as mistake:
        key = max(mistake.suspects, key=lambda key: _last(layers, key), default=mistake.key)
        culprit = key if mistake.suspects else mistake.culprit
        raise mistake.at(key, origin(layers, culprit)) from mistake.__cause__


# ----------------------------------------------------------------------- the files, as Hydra sees them


class Library(ConfigRepository):
    """Our YAML files as Hydra's defaults lists see them."""

    def __init__(self, options: files.Options) -> None:  # not that of the base, which looks for folders
        self.options = options
        self.loaded: dict[str, ConfigResult] = {}  # by Hydra's name for a file: model/lot

    def layer(self, name: str, package: str | None) -> Layer:
        """What a loaded file sets, at the package that it is merged at."""
        at = tuple(part for part in (package or "").split(".") if part not in ("", "_global_"))
        tree = _plain(self.loaded[name].config)
        for part in reversed(at):
            tree = {part: tree}
        file = Path(self.loaded[name].path)
        return Layer(files.show(file), tree, {(*at, *key): line for key, line in files.lines(file).items()})

    # ------------------------------------------------------------------ what Hydra asks for

    def config_exists(self, config_path: str) -> bool:
        return self.load_config(config_path) is not None

    def group_exists(self, config_path: str) -> bool:
        return config_path in self.options

    def get_group_options(self, group_name: str, results_filter: ObjectType | None = None) -> list[str]:
        return sorted(self.options.get(group_name, ()))

    def get_sources(self) -> list[ConfigSource]:
        return []

    def load_config(self, config_path: str) -> ConfigResult | None:
        """One file and its defaults list; None where an `optional` line asks for a file that there is not."""
        if config_path not in self.loaded:
            file = files.home() / "configs" / f"{PRIMARY}.yaml"
            if config_path != PRIMARY:
                group, _, option = config_path.partition("/")
                where, asked = self._line(option)
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
        except ValueError as error:
            raise ConfigError(f"defaults ({where}): {error}; a line is of the form `override /model: lot`") from None
        if name.startswith("experiment/"):
            header["package"] = "_global_"  # whatever it says
        elif header["package"] is None and re.search(r"(?m)^\s*#\s*@package\b", text):
            raise ConfigError(f"{where}: `# @package ...` must be the first line")
        for line in lines:
            if name != PRIMARY and isinstance(line, GroupDefault) and line.group in self.options:  # would be a group inside of this one
                raise ConfigError(f"{line.group}: {line.value} ({where}): write `override /{_key(line)}: {line.value}`, with the slash")
        if (overrides := [line.is_override() for line in lines]) != sorted(overrides):
            raise ConfigError(f"defaults ({where}): lines with `override` must come last")
        return ConfigResult("lab", str(file), config, header, lines)

    # ------------------------------------------------------------------ who asked for it

    def _line(self, option: str) -> tuple[str, Any]:
        """The file, and the line of its defaults list, that asks for an option; the command line where no file does."""
        found = [(where, line) for where, line in self._lines() if option == (line.value if isinstance(line, GroupDefault) else line.path)]
        return found[0] if found else (SHELL, None)

    def _lines(self) -> list[tuple[str, Any]]:
        return [(files.show(Path(result.path)), line) for result in self.loaded.values() for line in result.defaults_list or ()]

    def explained(self, request: Request, message: str) -> ConfigError:
        """Hydra's message about lines that do not go together, in our words."""
        if unknown := re.search(r"Could not override '(.+?)'(?:.*Did you mean to override (?:one of )?(.+?)[,?])?", message):
            key = unknown[1]
            near = unknown[2] or nearest(key, [_key(line) for _, line in self._lines() if not line.is_override()])
            end = f": no defaults list has {key}" + (f"; did you mean {near}" if near else "")
            for where, line in self._lines():
                if line.is_override() and _key(line) == key:
                    return ConfigError(f"override /{key}: {line.value} ({where}){end}{'?' if near else ''}")
            option = request.choices[key]
            return ConfigError(f"{key}={option} ({SHELL}){end}" + (f"={option}?" if near else ""))
        if twice := re.search(r"Multiple values for (\S+?)\.|(\S+) appears more than once", message):
            key = twice[1] or twice[2]
            where, line = [(where, line) for where, line in self._lines() if _key(line) == key and not line.is_override()][-1]
            return ConfigError(f"/{key}: {line.value} ({where}): write `override /{key}: {line.value}`, the defaults have one already")
        words = " ".join(f"{key}={option}" for key, option in request.choices.items()) or "configs/train.yaml"
        return ConfigError(f"the defaults lists of {words} do not compose: {message}")


def _key(line: Any) -> str:
    """mixer@model.mixer, as the line has it; "" for one that names no group."""
    if not isinstance(line, GroupDefault):
        return ""
    return str(line.group).removeprefix("/") + (f"@{line.package}" if line.package else "")


def _plain(config: Any) -> dict[str, Any]:
    tree: Any = OmegaConf.to_container(config, resolve=False)
    return tree
