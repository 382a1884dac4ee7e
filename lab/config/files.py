"""Where the YAML lives: lab's own folders, then those of the current folder.

    configs/<group>/<option>.yaml    the options of a group: model=lot, also from sub-folders: model=mine/small
    experiments/<name>.yaml          the options of the group `experiment`: experiment=repro/induction

Installed from a wheel, both folders sit inside the package; in a checkout, beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import yaml

from lab.config.errors import ConfigError, hint
from lab.config.tree import Key

if TYPE_CHECKING:
    from omegaconf import DictConfig

Options: TypeAlias = dict[str, dict[str, list[Path]]]
"""group -> option -> the files of that name, lab's own first."""


def home() -> Path:
    """The folder with lab's own configs/ and experiments/."""
    package = Path(__file__).resolve().parents[1]
    return package if (package / "configs").is_dir() else package.parent


def roots() -> list[Path]:
    """The folders whose configs/ and experiments/ are searched."""
    here = Path.cwd()
    return [home()] if here == home() else [home(), here]


def options() -> Options:
    """Every option of every group."""
    found: Options = {"experiment": {}}
    for root in roots():
        for file, (group, *rest) in _yaml_files(root / "configs"):
            if rest and group != "experiment":
                found.setdefault(group, {}).setdefault("/".join(rest), []).append(file)
        for file, names in _yaml_files(root / "experiments"):
            found["experiment"].setdefault("/".join(names), []).append(file)
    return found


def _yaml_files(folder: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The files of a folder with the parts of their names, those of hidden folders excepted."""
    for file in sorted(folder.rglob("*.yaml")):
        names = file.relative_to(folder).with_suffix("").parts
        if not any(name.startswith(".") for name in names):
            yield file, names


def option_file(found: Options, group: str, option: str, where: str, key: str | None = None) -> Path:
    """The file of one option; ConfigError where there is none, or two that differ.

    where: who asked for it. key: as it was asked for, such as mixer@model.mixer.
    """
    asked = f"{key or group}={option} ({where})"
    if group not in found:
        raise ConfigError(f"{asked}: there is no group {group}{hint(group, found, 'groups')}")
    if option not in found[group]:
        names = sorted(found[group])
        near = hint(option, names, "options")
        listed = f" ({', '.join(names)})" if "did you mean" in near and len(names) <= 30 else ""
        raise ConfigError(f"{asked}: there is no such option{near}{listed}")
    first, *others = found[group][option]
    for other in others:
        if other.read_bytes() != first.read_bytes():
            raise ConfigError(f"{asked}: {show(other)} has the name of lab's own {show(first)}; rename yours")
    return first


def experiment_name(file: Path) -> str:
    """The name of an experiment given by file: relative to a searched experiments/ folder, else the stem."""
    for root in roots():
        if file.resolve().is_relative_to(root / "experiments"):
            return file.resolve().relative_to(root / "experiments").with_suffix("").as_posix()
    return file.stem


def load(file: Path) -> DictConfig:
    """One YAML file, unresolved; ConfigError with the file, and the line where YAML has one."""
    from omegaconf import DictConfig, OmegaConf  # lab-train --help lists the options and reads none of them
    from omegaconf.errors import OmegaConfBaseException

    try:
        text = file.read_text(encoding="utf-8")
        top = _parse(text)
        if top is not None and not isinstance(top, yaml.MappingNode):
            raise ConfigError(f"{show(file)}: expected lines of the form `key: value`, got {type(top).__name__[:-4].lower()} content")
        config = OmegaConf.load(file)
    except FileNotFoundError:
        near = [path.name for path in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise ConfigError(f"{show(file)}: there is no such file{hint(file.name, near, 'in that folder')}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{show(file)}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{show(file)}: not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ConfigError(f"{show(file)}: cannot be read: {error.strerror}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{show(file)}: {error.full_key}: malformed interpolation; the form is ${{group.key}}") from None
    assert isinstance(config, DictConfig)  # of a mapping
    return config


def lines(file: Path) -> dict[Key, int]:
    """The line of each key and item; names are texts: ("task", "lengths", "0")."""
    return dict(_lines(_parse(file.read_text(encoding="utf-8")), ()))


def _lines(node: yaml.Node | None, at: Key) -> Iterator[tuple[Key, int]]:
    inner: Iterable[tuple[str, yaml.Node, yaml.Node]] = ()
    if isinstance(node, yaml.MappingNode):
        inner = ((str(name.value), name, value) for name, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        inner = ((str(index), value, value) for index, value in enumerate(node.value))
    for name, mark, value in inner:
        yield (*at, name), mark.start_mark.line + 1
        yield from _lines(value, (*at, name))


def _parse(text: str) -> yaml.Node | None:
    """The nodes of a YAML text, each with its line; by the C parser where yaml has it."""
    node: yaml.Node | None = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return node


def show(path: Path) -> str:
    """The path as the user would type it: relative to the current folder where it lies below."""
    full = Path.cwd() / path
    return full.relative_to(Path.cwd()).as_posix() if full.is_relative_to(Path.cwd()) else str(full)
