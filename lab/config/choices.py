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
from omegaconf import DictConfig, ListConfig, OmegaConf
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
    chosen = {key: option for key, option in config.hydra.runtime.choices.items() if not key.startswith("hydra/")}
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
    experiment = request.choices.get("experiment")
    overriding = []
    if experiment is not None:
        overriding = _entries(files.option_file(request.options, "experiment", experiment, SHELL))
    wanted = {e.key: e.option for e in overriding if e.override} | request.choices
    walked: list[tuple[Path, list[Entry]]] = []
    queue = [_primary(), *(files.option_file(request.options, k.partition("@")[0], o, SHELL) for k, o in request.choices.items())]
    for file in queue:  # grows while it is walked
        entries = _entries(file)
        walked.append((file, entries))
        for entry in entries:
            if not entry.absolute and file != _primary():
                if entry.group in request.options:
                    raise ConfigError(f"{entry.text} ({files.show(file)}): write `override /{entry.key}: {entry.option}`, with the slash")
                continue
            option = entry.option if entry.override else wanted.get(entry.key, entry.option)
            found = files.option_file(request.options, entry.group, option, files.show(file))
            if found not in queue:
                queue.append(found)
    known = _known_keys(request, wanted)
    for file, entries in walked:
        for entry in entries:
            if entry.override and entry.key not in known:
                raise ConfigError(f"{entry.text} ({files.show(file)}): no defaults list has {entry.key} to override{_instead(entry.key, known)}")
            if not entry.override and "experiments" in file.parts and entry.key in known:
                raise ConfigError(f"{entry.text} ({files.show(file)}): write `override /{entry.key}: {entry.option}`")
        overrides = [entry.override for entry in entries]
        if overrides != sorted(overrides):
            raise ConfigError(f"defaults ({files.show(file)}): lines with `override` must come last")
    for key, option in request.choices.items():
        if key not in known:
            raise ConfigError(f"{key}={option} ({SHELL}): {key} is not chosen by this config{_instead(key, known)}")


def _entries(file: Path) -> list[Entry]:
    """The lines of a file's defaults list that choose an option of a group."""
    defaults = files.load(file).get("defaults") or []
    if not isinstance(defaults, ListConfig):
        raise ConfigError(f"defaults ({files.show(file)}): expected a list, such as `- override /model: lot`")
    found = []
    for line in OmegaConf.to_container(defaults, resolve=False):
        if isinstance(line, dict) and len(line) == 1:
            ((name, option),) = line.items()
            *flags, key = str(name).split()
            if isinstance(option, str):
                found.append(Entry(key.removeprefix("/"), option, key.startswith("/"), "override" in flags, f"{name}: {option}"))
        elif not isinstance(line, str):
            raise ConfigError(f"defaults ({files.show(file)}): {line} is not a line such as `override /model: lot`")
    return found


def _known_keys(request: Request, wanted: dict[str, str]) -> list[str]:
    """The keys that can be overridden: those of the request without its experiment and without what it puts at a package."""
    plain = {key: option for key, option in wanted.items() if "@" not in key and key != "experiment"}
    for choices in (plain, {key: option for key, option in plain.items() if key in {e.key for e in _entries(_primary())}}, {}):
        try:
            return list(_hydra_compose(replace(request, choices=choices))[1])
        except FAILURES:
            continue
    return []


def _instead(key: str, known: list[str]) -> str:
    """What to write for a group that is chosen at another package, or was mistyped."""
    group = key.partition("@")[0]
    other = next((k for k in known if k.partition("@")[0] == group), None) or nearest(key, known)
    return f"; did you mean {other}?" if other else f"; it has {', '.join(known)}"


def _files_in_words(request: Request) -> str:
    return " ".join(f"{key}={option}" for key, option in request.choices.items()) or "configs/train.yaml"
