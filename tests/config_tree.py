"""A small config tree for the tests of lab.config: a `home` in place of lab's own folders, and a user's folder with the module `toy`."""

from __future__ import annotations

import importlib
import sys
import textwrap
from pathlib import Path

import pytest

from lab.config import Composed, ConfigError, check, check_late, compose, files

HOME = {
    "configs/train.yaml": """
        defaults:
          - _self_
          - model: lot
          - task: copy
          - trainer: default
          - optimizer: adam
          - callbacks: default
          - experiment: none
        seed: 42
        run_dir: null
        loss_weights: {}
        """,
    "configs/model/lot.yaml": """
        # @package _global_
        defaults:
          - /mixer@model.mixer: lattice
          - _self_
        model:
          _target_: toy.Model
          vocab_size: ${task.vocab_size}
          d_model: 128
          n_layers: 4
        loss_weights: {sync: 0.02, diversity: 0.01}
        """,
    "configs/model/transformer.yaml": """
        # @package _global_
        defaults:
          - /mixer@model.mixer: attention
          - _self_
        model: {_target_: toy.Model, vocab_size: "${task.vocab_size}", d_model: 128, n_layers: 4}
        loss_weights: {}
        """,
    "configs/mixer/attention.yaml": "{_target_: toy.Attention, _partial_: true, n_heads: 4}",
    "configs/mixer/lattice.yaml": "{_target_: toy.Lattice, _partial_: true, n_heads: 4, shape: [2, 2], mode: wave}",
    "configs/task/copy.yaml": "{_target_: toy.Task, vocab_size: 1000, lengths: [1]}",
    "configs/task/own.yaml": "{_target_: toy.Task, vocab_size: 7, lengths: [1], data: '???'}",
    "configs/trainer/default.yaml": "{_target_: toy.Settings, max_steps: null, devices: 1, batch_size: 8, compile: false}",
    "configs/optimizer/adam.yaml": "{_target_: toy.Adam, lr: 3e-4, betas: [0.9, 0.999]}",
    "configs/callbacks/default.yaml": "progress: {_target_: toy.Progress, every: 10}",
    "experiments/none.yaml": "# the defaults",
    "experiments/small.yaml": """
        # @package _global_
        defaults:
          - override /model: lot
        model: {d_model: 64, n_layers: 2}
        trainer: {max_steps: 100}
        """,
    "experiments/repro/induction.yaml": "seed: 7",
}

TOY = """
    from __future__ import annotations

    from collections.abc import Callable, Mapping, Sequence
    from dataclasses import dataclass
    from pathlib import Path
    from typing import Any, Literal, Optional

    class Mixer: ...

    class Attention(Mixer):
        def __init__(self, d_model: int, n_heads: int) -> None:
            if d_model % n_heads:
                raise ValueError(f"n_heads={n_heads} does not divide d_model={d_model}")

    class Lattice(Mixer):
        def __init__(
            self, d_model: int, n_heads: int, shape: Optional[list[int]] = None, mode: Literal["wave", "gain"] = "wave"
        ) -> None: ...

    class Loose(Mixer):
        def __init__(self, d_model: int, width: int = 1, **more: Any) -> None:
            self.more = more

    class Model:
        def __init__(
            self, vocab_size: int, d_model: int, n_layers: int, mixer: Callable[..., Mixer], sizes: tuple[int, float] = (1, 2.0),
            path: Path | None = None, names: Mapping[str, int] | None = None, level: Literal[0, 1] = 0,
        ) -> None:
            self.mixer, self.sizes, self.names = mixer(d_model=d_model), sizes, names

    class Task:
        def __init__(self, vocab_size: int, lengths: Sequence[int], data: Any = None) -> None:
            self.lengths, self.data = lengths, data

    @dataclass(frozen=True)
    class Settings:
        max_steps: int | None = None
        devices: int | str = 1
        batch_size: int = 8
        compile: bool = False
        deterministic: bool | Literal["warn"] = "warn"

    @dataclass(frozen=True)
    class Adam:
        lr: float
        betas: tuple[float, ...] = (0.9, 0.999)

    class Progress:
        def __init__(self, every: int) -> None: ...

    def experiment(
        model: Model, task: Task, trainer: Settings, optimizer: Adam, callbacks: Mapping[str, Any] | None = None,
        loss_weights: Mapping[str, Any] | None = None, seed: int = 42, run_dir: str | None = None,
    ) -> None: ...
    """


def write(folder: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text).lstrip("\n"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write(folder, HOME)
    return folder


@pytest.fixture
def user(home, tmp_path, monkeypatch) -> Path:
    """The current folder of a user, with the module `toy`; lab's own folders are those of HOME."""
    write(tmp_path, {"toy.py": TOY})
    monkeypatch.setattr(files, "home", lambda: home)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def checked(*words: str) -> Composed:
    """Composed, and right in all that the checks look at."""
    composed = compose(list(words))
    check(composed, root=toy_root())
    check_late(composed, root=toy_root())
    return composed


def toy_root():
    """What `lab.training.Experiment` is for the real configs."""
    sys.path.append(str(Path.cwd()))
    return importlib.import_module("toy").experiment


def message(*words: str) -> str:
    """The one line that says what is wrong with these words."""
    with pytest.raises(ConfigError) as error:
        checked(*words)
    text = str(error.value)
    assert "\n" not in text and "hydra" not in text.lower() and "omegaconf" not in text.lower()
    return text
