"""Hydra's part: it chooses the files and merges them. What it cannot do is explained here, from the files themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import hydra
import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lab.config import files
from lab.config.errors import ConfigError, nearest
from lab.config.overrides import SHELL, Request, quote

PRIMARY = "train"
FAILURES = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, AssertionError, AttributeError, TypeError)
"""What Hydra raises for files that it cannot compose."""


def choose(request: Request) -> tuple[DictConfig, dict[str, str]]:
    """The chosen files, merged and unresolved, without the request's values; and group -> option. Raises ConfigError."""
    try:
        config, chosen = _hydra_compose(request)
    except FAILURES as error:
        _diagnose(request)
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"the defaults lists of {_files_in_words(request)} do not compose: {reason}") from error
    for key, option in chosen.items():
        files.option_file(request.options, key.partition("@")[0], option, "defaults")  # ConfigError for two files of one name
    return config, chosen


def chosen_files(request: Request) -> list[tuple[Path, str]]:
    """The files that `choose` merges, in order, each with the package it is merged at ("" for the root)."""
    with _hydra(request) as (loader, overrides):
        merged: list[ResultDefault] = loader.compute_defaults_list(PRIMARY, overrides, RunMode.RUN).defaults
    found = []
    for default in merged:
        path, package = default.config_path or "", default.package or ""
        if path == PRIMARY:
            found.append((_primary(), package))
        elif not path.startswith("hydra"):
            group, _, option = path.partition("/")
            found.append((files.option_file(request.options, group, option, "defaults"), package))
    return found


@contextmanager
def _hydra(request: Request) -> Iterator[tuple[ConfigLoader, list[str]]]:
    """Hydra set on our folders: its loader, and the request's choices as Hydra's overrides."""
    store = ConfigStore.instance()
    store.repo.pop("experiment", None)  # those of an earlier call
    for name, (file, *_) in request.options["experiment"].items():
        try:
            node = files.load(file)
        except ConfigError:
            continue  # a broken file concerns only those who choose it: `_diagnose` loads it again
        *parents, stem = name.split("/")
        store.store(group="/".join(["experiment", *parents]), name=stem, package="_global_", node=node)
    overrides = [f"{key}={quote(option)}" for key, option in request.choices.items()]
    folders = [root / "configs" for root in files.roots()[1:]]
    search = ",".join(quote(f"file://{folder}") for folder in folders if folder.is_dir())
    with hydra.initialize_config_dir(str(files.home() / "configs"), job_name="lab", version_base="1.3"):
        yield GlobalHydra.instance().config_loader(), [*overrides, f"hydra.searchpath=[{search}]"]


def _hydra_compose(request: Request) -> tuple[DictConfig, dict[str, str]]:
    with _hydra(request) as (_, overrides):
        config = hydra.compose(PRIMARY, overrides, return_hydra_config=True)
    choices = config.hydra.runtime.choices
    chosen = {key: option for key, option in choices.items() if isinstance(option, str) and not key.startswith("hydra/")}
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return config, chosen


def _primary() -> Path:
    return files.home() / "configs" / f"{PRIMARY}.yaml"


# ----------------------------------------------------------------------- why files do not compose


class Entry(NamedTuple):
    """One line of a defaults list, such as `override /mixer@model.mixer: attention`."""

    key: str  # mixer@model.mixer
    option: str
    absolute: bool
    override: bool
    text: str

    @property
    def group(self) -> str:
        return self.key.partition("@")[0]


def _diagnose(request: Request) -> None:
    """Raises the ConfigError that names the file or word at fault; returns if all of them look right."""
    options = request.options
    asked = [(key, files.option_file(options, key.partition("@")[0], option, SHELL)) for key, option in request.choices.items()]
    experiments = [file for key, file in asked if key == "experiment"]
    wanted = {e.key: e.option for file in experiments for e in _entries("experiment", file) if e.override} | request.choices
    known = _known_keys(request, wanted)
    queue = [("", _primary()), *((key.partition("@")[0], file) for key, file in asked)]
    for group, file in queue:  # grows while it is walked
        where = files.show(file)
        entries = _entries(group, file)
        for entry in entries:
            if group and not entry.absolute and entry.group in options:
                raise ConfigError(f"{entry.text} ({where}): write `override /{entry.key}: {entry.option}`, with the slash")
            if entry.override and entry.key not in known:
                raise ConfigError(f"{entry.text} ({where}): no defaults list has {entry.key} to override{_instead(entry.key, known)}")
            if group == "experiment" and not entry.override and entry.key in known and entry.key != group:
                raise ConfigError(f"{entry.text} ({where}): write `override /{entry.key}: {entry.option}`, the defaults have one already")
            if entry.override or entry.key not in wanted or entry.key == group:
                found = (entry.group, files.option_file(options, entry.group, entry.option, where, entry.key))
                queue += [found] if found not in queue else []
        if (overrides := [entry.override for entry in entries]) != sorted(overrides):
            raise ConfigError(f"defaults ({where}): lines with `override` must come last")
    for key, option in request.choices.items():
        if key not in known:
            raise ConfigError(f"{key}={option} ({SHELL}): no defaults list has {key}{_instead(key, known, f'={option}')}")


def _entries(group: str, file: Path) -> list[Entry]:
    """The lines of a file's defaults list that choose an option; a plain name is another option of the file's own group."""
    lines = OmegaConf.to_container(files.load(file), resolve=False).get("defaults") or []  # type: ignore[union-attr]
    if not isinstance(lines, list):
        raise ConfigError(f"defaults ({files.show(file)}): expected a list, such as `- override /model: lot`")
    found = []
    for line in lines:
        name, option = next(iter(line.items())) if isinstance(line, dict) and len(line) == 1 else (group, line)
        *flags, key = str(name).split() or [""]
        if not isinstance(option, str) or not (group or isinstance(line, dict) or option == "_self_"):
            raise ConfigError(f"defaults ({files.show(file)}): {line} is not of the form `override /model: lot`")
        if option != "_self_":
            text = option if isinstance(line, str) else f"{name}: {option}"
            absolute = key.startswith("/") or isinstance(line, str)
            found.append(Entry(key.removeprefix("/"), option, absolute, "override" in flags, text))
    return found


def _known_keys(request: Request, wanted: dict[str, str]) -> list[str]:
    """The keys that can be overridden: those of the request without its experiment and without what it puts at a package."""
    plain = {key: option for key, option in wanted.items() if "@" not in key and key != "experiment"}
    usual = {entry.key for entry in _entries("", _primary())}
    for choices in (plain, {key: option for key, option in plain.items() if key in usual}, {}):
        try:
            return list(_hydra_compose(replace(request, choices=choices))[1])
        except FAILURES:
            continue
    return []


def _instead(key: str, known: list[str], option: str = "") -> str:
    """What to write for a group that is chosen at another package, or was mistyped."""
    group = key.partition("@")[0]
    other = next((k for k in known if k.partition("@")[0] == group), None) or nearest(key, known)
    return f"; did you mean {other}{option}?" if other else f"; they have {', '.join(known)}"


def _files_in_words(request: Request) -> str:
    return " ".join(f"{key}={option}" for key, option in request.choices.items()) or "configs/train.yaml"
