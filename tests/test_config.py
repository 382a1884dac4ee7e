"""Composition, its errors, provenance, safety and identity, on a small tree of its own: a `home` with lab's folders and a user's folder.

The real configs are composed and checked at the end.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest

from lab.config import (
    Composed,
    ConfigError,
    build,
    check,
    check_late,
    compose,
    config_hash,
    explain,
    files,
    first_difference,
    override,
    resolve,
)
from lab.config.layers import layers
from lab.config.tree import leaves, places

REPOSITORY = Path(__file__).resolve().parents[1]

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
    "configs/task/own.yaml": "{_target_: toy.Task, vocab_size: 7, lengths: [1], data: ???}",
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

TOY = '''
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
        def __init__(self, d_model: int, n_heads: int, shape: Optional[list[int]] = None, mode: Literal["wave", "gain"] = "wave") -> None: ...

    class Loose(Mixer):
        def __init__(self, d_model: int, width: int = 1, **more: Any) -> None:
            self.more = more

    class Model:
        def __init__(self, vocab_size: int, d_model: int, n_layers: int, mixer: Callable[..., Mixer], sizes: tuple[int, float] = (1, 2.0),
                     dropout: float = 0.0, path: Path | None = None, names: Mapping[str, int] | None = None) -> None:
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

    def experiment(model: Model, task: Task, trainer: Settings, optimizer: Adam, callbacks: Mapping[str, Any] | None = None,
                   loss_weights: Mapping[str, Any] | None = None, seed: int = 42, run_dir: str | None = None) -> None: ...
    '''


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
    composed = compose(list(words))
    check(composed, root=_experiment())
    check_late(composed, root=_experiment())
    return composed


def _experiment():
    sys.path.append(str(Path.cwd()))
    import toy

    return toy.experiment


def message(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        checked(*words)
    text = str(error.value)
    assert "\n" not in text and "hydra" not in text.lower() and "omegaconf" not in text.lower()
    return text


# ----------------------------------------------------------------------- what works


def test_the_layers_of_a_config(user):
    composed = checked("experiment=small", "optimizer.lr=1e-3", "+loss_weights.sync=0", "++seed=3")
    config = composed.config
    assert config["model"]["n_layers"] == 2  # the experiment over the option
    assert config["model"]["vocab_size"] == 1000  # an interpolation
    assert config["model"]["mixer"] == {"_target_": "toy.Lattice", "_partial_": True, "n_heads": 4, "shape": [2, 2], "mode": "wave"}
    assert config["optimizer"]["lr"] == 1e-3
    assert config["loss_weights"] == {"sync": 0, "diversity": 0.01}
    assert config["seed"] == 3
    assert "hydra" not in config and "defaults" not in config and "experiment" not in config
    assert composed.stored == config
    assert composed.choices["experiment"] == "small"
    assert composed.choices["model"] == "lot"
    assert composed.choices["mixer@model.mixer"] == "lattice"
    assert not any("hydra" in key for key in composed.choices)
    assert type(config["model"]) is dict and type(config["optimizer"]["betas"]) is list


def test_yaml_floats_without_a_dot_are_floats(user):
    assert checked().config["optimizer"]["lr"] == 3e-4
    assert checked("optimizer.lr=1e-3").config["optimizer"]["lr"] == 1e-3


def test_another_model_takes_its_loss_weights_along(user):
    composed = checked("model=transformer", "experiment=none")
    assert composed.config["loss_weights"] == {}
    assert composed.config["model"]["mixer"]["_target_"] == "toy.Attention"
    assert "shape" not in composed.config["model"]["mixer"]


def test_an_option_inside_of_a_node(user):
    composed = checked("mixer@model.mixer=attention")
    assert composed.config["model"]["mixer"] == {"_target_": "toy.Attention", "_partial_": True, "n_heads": 4}
    assert composed.choices["mixer@model.mixer"] == "attention"
    assert composed.config["loss_weights"] == {"sync": 0.02, "diversity": 0.01}


@pytest.mark.parametrize("word", ["model=transformer", "+model=transformer", "++model=transformer", "model='transformer'"])
def test_the_signs_mean_nothing(user, word):
    assert checked(word).choices["model"] == "transformer"


def test_experiments_in_folders_and_by_file(user, home):
    assert checked("experiment=repro/induction").config["seed"] == 7
    write(user, {"else where/it's.yaml": "seed: 9", "deep/experiments/x.yaml": "seed: 10"})
    composed = checked("--config=else where/it's.yaml", "trainer.max_steps=3")
    assert (composed.config["seed"], composed.config["trainer"]["max_steps"]) == (9, 3)
    assert composed.choices["experiment"] == "it's"
    assert checked(f"--config={home}/experiments/repro/induction.yaml").choices["experiment"] == "repro/induction"
    assert checked("--config=deep/experiments/x.yaml").config["seed"] == 10


def test_a_file_wins_over_an_experiment_of_its_name(user):
    write(user, {"elsewhere/small.yaml": "seed: 11"})
    assert checked("--config=elsewhere/small.yaml").config["seed"] == 11
    assert checked("experiment=small").config["seed"] == 42


def test_an_experiment_upon_another(user):
    write(user, {"experiments/vanilla.yaml": "defaults:\n  - small\n  - override /model: transformer\nseed: 5"})
    composed = checked("experiment=vanilla")
    assert composed.choices["model"] == "transformer"
    assert (composed.config["model"]["n_layers"], composed.config["seed"]) == (2, 5)


def test_the_current_folder_extends_lab(user):
    write(
        user,
        {
            "mything.py": "from toy import Mixer\nclass Mine(Mixer):\n    def __init__(self, d_model: int, gain: float) -> None: ...",
            "configs/mixer/mine.yaml": "{_target_: mything.Mine, _partial_: true, gain: 2}",
            "configs/model/deep/mine.yaml": HOME["configs/model/lot.yaml"].replace("lattice", "mine"),
            "experiments/mine.yaml": "defaults: [override /model: deep/mine]\nseed: 8",
        },
    )
    composed = checked("experiment=mine", "model.mixer.gain=0.5")
    assert composed.config["model"]["mixer"] == {"_target_": "mything.Mine", "_partial_": True, "gain": 0.5}
    assert composed.choices["model"] == "deep/mine"
    assert type(build(composed.config["model"]).mixer).__name__ == "Mine"
    assert "did you mean model.mixer.gain?" in message("experiment=mine", "model.mixer.gian=1")


def test_a_file_that_hides_one_of_lab_is_refused(user, home):
    write(user, {"configs/task/copy.yaml": HOME["configs/task/copy.yaml"]})
    checked()  # the same content: an installed lab beside its own checkout
    (user / "configs/task/copy.yaml").write_text("vocab_size: 3")
    assert "configs/task/copy.yaml has the name of lab's own" in message()


def test_deletion_and_merging(user):
    assert "diversity" not in checked("~loss_weights.diversity").config["loss_weights"]
    assert checked("~callbacks.progress").config["callbacks"] == {}
    assert checked("model={d_model: 8}").config["model"]["n_layers"] == 4
    assert checked("loss_weights.sync={value: 1, schedule: ramp}").config["loss_weights"]["sync"] == {"value": 1, "schedule": "ramp"}


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("run_dir='a, b [c] (d)'", "a, b [c] (d)"),
        ('run_dir="it\'s"', "it's"),
        ("run_dir=a b", "a b"),
        ("run_dir=/tmp/x=y".replace("=y", "y"), "/tmp/xy"),
        ("run_dir='${task.vocab_size}x'", "1000x"),
        ("run_dir=null", None),
        ("run_dir='null'", "null"),
        ("run_dir='1e-3'", "1e-3"),
    ],
)
def test_values_of_the_shell(user, word, value):
    assert checked(word).config["run_dir"] == value


@pytest.mark.parametrize(
    "word",
    [
        "optimizer.lr=1",  # an int is a number
        "model.sizes=[1,2]",
        "model.path=a/b",
        "model.names={a: 1, b: 2}",
        "model.names=null",
        "model.mixer.shape=null",
        "model.mixer.shape=[]",
        "model.mixer.mode=gain",
        "trainer.devices=auto",
        "trainer.deterministic=warn",
        "trainer.deterministic=true",
        "trainer.max_steps=3",
        "optimizer.betas=[1,2,3]",
        "task.data=[1,{a: b}]",
        "task.data={_target_: toy.Task, vocab_size: 1, lengths: []}",
        "task.data={_target_: builtins.dict, a: 1}",
        "model.mixer={_target_: toy.Loose, n_headz: 4, anything: [goes]}",  # **kwargs: names cannot be checked
        "callbacks.second={_target_: toy.Progress, every: 2}",
        "callbacks.progress=null",
    ],
)
def test_right_values(user, word):
    checked(word)


# ----------------------------------------------------------------------- one sentence for each mistake

SHELL = "(command line)"
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    # names
    "key": (["model.n_layer=3"], ["model.n_layer", SHELL, "toy.Model has no such argument", "did you mean model.n_layers?"]),
    "key+": (["+model.n_layer=3"], ["model.n_layer", SHELL, "did you mean model.n_layers?"]),
    "key++": (["++model.n_layer=3"], ["model.n_layer", SHELL, "did you mean model.n_layers?"]),
    "nested key": (["model.mixer.n_head=3"], [SHELL, "toy.Lattice has no such argument", "did you mean model.mixer.n_heads?"]),
    "key in braces": (["model.mixer={n_head: 3}"], ["model.mixer.n_head", SHELL, "did you mean model.mixer.n_heads?"]),
    "root key": (["sed=3"], ["sed", SHELL, "did you mean seed?"]),
    "root+": (["++foo.bar=1"], ["foo.bar", SHELL, "there is no such key; valid: callbacks,"]),
    "group name": (["modle=lot"], ["modle", SHELL, "did you mean model?"]),
    "group name of a node": (["modle.d_model=1"], ["did you mean model.d_model?"]),
    "key without its node": (["lr=3"], ["lr", SHELL, "did you mean optimizer.lr?"]),
    "key in another node": (["model.lr=3"], ["did you mean optimizer.lr?"]),
    "reserved": (["model.mixer._partal_=true"], ["did you mean model.mixer._partial_?"]),
    "flag": (["model.mixer._partial_=yess"], ["model.mixer._partial_", "expected true or false, got 'yess'"]),
    "two mistakes in a key": (["model.n_layer=3", "model.n_layer=abc"], ["model.n_layer", "did you mean model.n_layers?"]),
    # choices
    "option": (["model=transfomer"], ["model=transfomer", SHELL, "did you mean transformer?", "lot, transformer"]),
    "experiment": (["experiment=smal"], ["experiment=smal", SHELL, "did you mean small?", "none, repro/induction, small"]),
    "far experiment": (["experiment=zzz"], ["there is no such option; options: none, repro/induction, small"]),
    "inner option": (["mixer@model.mixer=latice"], ["mixer@model.mixer=latice", SHELL, "did you mean lattice?"]),
    "inner option of no group": (["mixr@model.mixer=lattice"], ["there is no group mixr", "did you mean mixer?"]),
    "inner group, plain": (["mixer=attention"], [SHELL, "did you mean mixer@model.mixer=attention?"]),
    "inner group, elsewhere": (["mixer@model.mixr=attention"], [SHELL, "did you mean mixer@model.mixer=attention?"]),
    "inner node": (["model.mixer=attention"], ["model.mixer=attention", SHELL, "chosen by mixer@model.mixer=attention"]),
    "null option": (["model=null"], ["model=null", SHELL, "the name of one option: lot, transformer"]),
    "two options": (["model=[lot,transformer]"], ["the name of one option"]),
    "deleted choice": (["~mixer@model.mixer"], ["~mixer@model.mixer", "the name of one option"]),
    "deleted node": (["~model"], ["model", "it is missing; it must be a node with _target_ (a Model)"]),
    "file as a name": (["experiment=small.yaml"], ["a file is given by --config small.yaml"]),
    "file as a word": (["small.yaml"], ["expected key=value; a file is given by --config small.yaml"]),
    "no such file": (["--config=smal.yaml"], ["smal.yaml: there is no such file"]),
    "two experiments": (["--config=x.yaml", "experiment=small"], ["two are given, x and small"]),
    # types
    "text for int": (["model.d_model=abc"], ["model.d_model", SHELL, "expected an int, got 'abc'"]),
    "quoted int": (["model.d_model='8'"], ["expected an int, got '8', a text; remove its quotes"]),
    "bool for int": (["model.d_model=true"], ["expected an int, got true"]),
    "int for bool": (["trainer.compile=1"], ["expected true or false, got 1"]),
    "float for int": (["model.d_model=0.5"], ["expected an int, got 0.5"]),
    "whole float for int": (["trainer.max_steps=1e4"], ["expected an int or null, got 10000.0; write 10000"]),
    "bool for float": (["optimizer.lr=true"], ["optimizer.lr", "expected a number, got true"]),
    "null for int": (["model.d_model=null"], ["expected an int, got null"]),
    "optional": (["trainer.max_steps=soon"], ["expected an int or null, got 'soon'"]),
    "list for int": (["model.d_model=[1]"], ["expected an int, got [1]"]),
    "int for list": (["model.mixer.shape=2"], ["model.mixer.shape", "expected a list (an int each) or null, got 2"]),
    "item": (["model.mixer.shape=[2,x]"], ["model.mixer.shape.1", SHELL, "expected an int, got 'x'"]),
    "text for list": (["task.lengths=ab"], ["expected a list (an int each), got 'ab'"]),
    "short tuple": (["model.sizes=[1]"], ["expected a list of 2 values, got [1]"]),
    "item of a tuple": (["model.sizes=[1.5,1]"], ["model.sizes.0", "expected an int, got 1.5"]),
    "literal": (["model.mixer.mode=wav"], ["model.mixer.mode", "expected wave or gain, got 'wav'; did you mean wave?"]),
    "literal or bool": (["trainer.deterministic=wrn"], ["expected true or false or warn", "did you mean warn?"]),
    "value for a node": (["model=3"], ["the name of one option"]),
    "value for a callable": (["model.mixer=3"], ["model.mixer", SHELL, "expected a node with _target_ and `_partial_: true` (of a Mixer), got 3"]),
    "dict for a value": (["seed.foo=1"], ["seed", SHELL, 'expected an int, got {"foo": 1}']),
    "mapping of ints": (["model.names={a: b}"], ["model.names.a", "expected an int, got 'b'"]),
    "other class": (["model._target_=toy.Task"], ["model", SHELL, "expected a node with _target_ (a Model), got a toy.Task"]),
    "other partial": (["model.mixer._target_=toy.Task"], ["model.mixer", SHELL, "(of a Mixer), got a partial toy.Task"]),
    "no partial": (["model.mixer._partial_=false"], ["model.mixer", SHELL, "`_partial_: true` is missing"]),
    "partial": (["+task._partial_=true"], ["task", SHELL, "(a Task), got a partial toy.Task"]),
    "known names of **kwargs": (["model.mixer={_target_: toy.Loose, width: x}"], ["model.mixer.width", "expected an int, got 'x'"]),
    "late": (["callbacks.progress.every=x"], ["callbacks.progress.every", SHELL, "expected an int, got 'x'"]),
    "late name": (["callbacks.progress.evry=3"], ["did you mean callbacks.progress.every?"]),
    # targets
    "class": (["model._target_=toy.Modle"], ["model._target_", SHELL, "toy has no Modle; did you mean Model?"]),
    "module": (["model._target_=toyy.Model"], ["there is no module toyy; did you mean toy?"]),
    "class of lab": (["model.mixer._target_=lab.mixrs.Lattice"], ["model.mixer._target_", "lab has no mixrs; did you mean mixers?"]),
    "module for a class": (["model._target_=json"], ["json is not a class or function"]),
    "not a name": (["model._target_='a b'"], ["'a b' is not the dotted name"]),
    "number for a target": (["model._target_=3"], ["model._target_", "3 is not the dotted name"]),
    # missing
    "missing value": (["task=own"], ["task.data (", "configs/task/own.yaml:1)", "it needs a value, any value: task.data=..."]),
    "missing argument": (["~model.d_model"], ["model.d_model (", "configs/model/lot.yaml:6)", "toy.Model needs it; it must be an int"]),
    "missing where used": (["task.vocab_size=???"], ["model.vocab_size (", "${task.vocab_size} refers to a value that is missing; set task.vocab_size=..."]),
    # grammar
    "no sign": (["foo"], ["foo", SHELL, "expected key=value"]),
    "no key": (["=3"], ["is not a key"]),
    "odd key": (["a[0]=3"], ["'a[0]' is not a key"]),
    "option sign": (["--foo=3"], ["'--foo' is not a key"]),
    "open bracket": (["task.lengths=[1"], ["task.lengths", SHELL, "cannot read the value [1; a list is 'task.lengths=[1,2]'"]),
    "parenthesis": (["run_dir=a(b)"], ["cannot read the value a(b)"]),
    "sweep": (["seed=1,2"], ["seed", SHELL, "1,2 is several values; a list is 'seed=[1,2]'"]),
    "range": (["seed=range(1,3)"], ["is several values"]),
    "list item": (["task.lengths.7=1"], ["task.lengths.7", "there is no such place"]),
    "nothing to delete": (["~model.d_modle"], ["~model.d_modle", SHELL, "no such key to delete; did you mean d_model?"]),
    "other value to delete": (["~model.d_model=3"], ["its value is 128, not 3"]),
    "key of a stranger": (["hydr.run.dir=x"], ["hydr.run.dir", "there is no such key"]),
    # interpolation
    "reference": (["run_dir=${task.vocabsize}"], ["run_dir", SHELL, "${task.vocabsize} refers to a key that does not exist; did you mean task.vocab_size?"]),
    "relative reference": (["model.d_model=${.nlayers}"], ["model.d_model", SHELL, "${.nlayers} cannot be resolved"]),
    "resolver": (["run_dir=${env:HOME}"], ["run_dir", SHELL, "unknown resolver; did you mean oc.env?"]),
    "environment": (["run_dir=${oc.env:LAB_NO_SUCH}"], ["run_dir", SHELL, "needs the environment variable LAB_NO_SUCH, which is not set"]),
    "circle": (["seed=${run_dir}", "run_dir=${seed}"], ["refers to itself"]),
    "escaped": (["run_dir='\\${seed}'"], ["run_dir", "can contain the text ${"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_on_the_command_line(user, name):
    words, parts = MISTAKES[name]
    write(user, {"x.yaml": "seed: 1"})
    text = message(*words)
    for part in parts:
        assert part in text, text


def test_settings_of_hydra_are_refused(user):
    for word in ("hydra.run.dir=x", "hydra/launcher=basic", "hydra=x", "+hydra.verbose=true"):
        with pytest.raises(ConfigError, match="have no effect here; run_dir=PATH"):
            compose([word])


FILES: dict[str, tuple[dict[str, str], list[str], list[str]]] = {
    "key": ({"experiments/x.yaml": "model:\n  n_layer: 3"}, ["experiment=x"],
            ["model.n_layer (experiments/x.yaml:2)", "did you mean model.n_layers?"]),
    "root key": ({"experiments/x.yaml": "sed: 3"}, ["experiment=x"], ["sed (experiments/x.yaml:1)", "did you mean seed?"]),
    "type": ({"experiments/x.yaml": "seed: '3'"}, ["experiment=x"], ["seed (experiments/x.yaml:1)", "expected an int, got '3', a text"]),
    "by file": ({"a/x.yaml": "\nmodle: {}"}, ["--config=a/x.yaml"], ["modle (a/x.yaml:2)", "did you mean model?"]),
    "in a list": ({"experiments/x.yaml": "task:\n  lengths:\n  - 1\n  - x"}, ["experiment=x"], ["task.lengths.1 (experiments/x.yaml:4)"]),
    "own option": ({"configs/task/mine.yaml": "_target_: toy.Task\nvocab_size: 7\nlenghts: [1]"}, ["task=mine"],
                   ["task.lenghts (configs/task/mine.yaml:3)", "did you mean task.lengths?"]),
    "own target": ({"configs/task/mine.yaml": "_target_: toy.Tsk"}, ["task=mine"],
                   ["task._target_ (configs/task/mine.yaml:1)", "toy has no Tsk; did you mean Task?"]),
    "own missing argument": ({"configs/task/mine.yaml": "_target_: toy.Task\nvocab_size: 7"}, ["task=mine"],
                             ["task.lengths (configs/task/mine.yaml:1)", "toy.Task needs it; it must be a list (an int each)"]),
    "the word wins": ({"experiments/x.yaml": "seed: a"}, ["experiment=x", "seed=b"], ["seed (command line)", "got 'b'"]),
    "choice as a value": ({"experiments/x.yaml": "model: transformer"}, ["experiment=x"],
                          ["model (experiments/x.yaml:1)", "got 'transformer'; an option is chosen by model=transformer", "`override /model: transformer`"]),
    "inner choice as a value": ({"experiments/x.yaml": "model: {mixer: attention}"}, ["experiment=x"],
                                ["chosen by mixer@model.mixer=attention"]),
    "yaml": ({"experiments/x.yaml": "model:\n  a: [1\n  b: 2"}, ["experiment=x"], ["experiments/x.yaml, line 3: not valid YAML"]),
    "yaml by file": ({"x.yaml": "a: 1\n\tb: 2"}, ["--config=x.yaml"], ["x.yaml, line 2: not valid YAML"]),
    "yaml of an option": ({"configs/task/mine.yaml": "a: {"}, ["task=mine"], ["configs/task/mine.yaml, line 1: not valid YAML"]),
    "key twice": ({"experiments/x.yaml": "seed: 1\nseed: 2"}, ["experiment=x"], ["experiments/x.yaml, line 2", "duplicate key seed"]),
    "list": ({"experiments/x.yaml": "- 1"}, ["experiment=x"], ["experiments/x.yaml: expected lines of the form `key: value`, got sequence"]),
    "word": ({"experiments/x.yaml": "abc"}, ["experiment=x"], ["got scalar"]),
    "number": ({"experiments/x.yaml": "3"}, ["experiment=x"], ["got scalar"]),
    "braces": ({"experiments/x.yaml": "seed: ${task.x"}, ["experiment=x"], ["experiments/x.yaml: seed: malformed interpolation"]),
    "reference": ({"experiments/x.yaml": "seed: ${sed}"}, ["experiment=x"], ["seed (experiments/x.yaml:1)", "did you mean seed?"]),
    "overridden option": ({"experiments/x.yaml": "defaults: [override /model: transfomer]"}, ["experiment=x"],
                          ["model=transfomer (experiments/x.yaml)", "did you mean transformer?"]),
    "overridden inner option": ({"experiments/x.yaml": "defaults: [override /mixer@model.mixer: atention]"}, ["experiment=x"],
                                ["mixer@model.mixer=atention (experiments/x.yaml)", "did you mean attention?"]),
    "overridden group": ({"experiments/x.yaml": "defaults: [override /modle: lot]"}, ["experiment=x"],
                         ["override /modle: lot (experiments/x.yaml)", "did you mean model?"]),
    "overridden plain inner group": ({"experiments/x.yaml": "defaults: [override /mixer: attention]"}, ["experiment=x"],
                                     ["(experiments/x.yaml)", "did you mean mixer@model.mixer?"]),
    "override forgotten": ({"experiments/x.yaml": "defaults: [/model: transformer]"}, ["experiment=x"],
                           ["/model: transformer (experiments/x.yaml)", "write `override /model: transformer`"]),
    "slash forgotten": ({"experiments/x.yaml": "defaults: [override model: transformer]"}, ["experiment=x"],
                        ["(experiments/x.yaml)", "write `override /model: transformer`, with the slash"]),
    "order": ({"experiments/x.yaml": "defaults: [override /model: lot, small]"}, ["experiment=x"],
              ["defaults (experiments/x.yaml): lines with `override` must come last"]),
    "base": ({"experiments/x.yaml": "defaults: [smal]"}, ["experiment=x"], ["experiment=smal (experiments/x.yaml)", "did you mean small?"]),
    "defaults": ({"experiments/x.yaml": "defaults: {model: lot}"}, ["experiment=x"], ["defaults (experiments/x.yaml): expected a list"]),
    "line of the defaults": ({"experiments/x.yaml": "defaults: [3]"}, ["experiment=x"], ["defaults (experiments/x.yaml): 3 is not of the form"]),
    "option in an option": ({"configs/model/mine.yaml": "# @package _global_\ndefaults: [/mixer@model.mixer: latice, _self_]"}, ["model=mine"],
                            ["mixer@model.mixer=latice (configs/model/mine.yaml)", "did you mean lattice?"]),
    "module": ({"broken.py": "import nosuch", "experiments/x.yaml": "model: {_target_: broken.A}"}, ["experiment=x"],
               ["model._target_ (experiments/x.yaml:1)", "broken.A cannot be imported: No module named 'nosuch'"]),
    "syntax": ({"broken.py": "def", "experiments/x.yaml": "model: {_target_: broken.A}"}, ["experiment=x"],
               ["broken.A cannot be imported: SyntaxError"]),
    "near file": ({"x.yaml": ""}, ["--config=xx.yaml"], ["xx.yaml: there is no such file; did you mean x.yaml?"]),
    "not text": ({"x.yaml": "a: \x00"}, ["--config=x.yaml"], ["x.yaml: not valid YAML"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_mistakes_in_files(user, name):
    contents, words, parts = FILES[name]
    write(user, contents)
    text = message(*words)
    for part in parts:
        assert part in text, text


def test_a_broken_experiment_disturbs_no_other(user):
    write(user, {"experiments/broken.yaml": "a: ["})
    checked("experiment=small")


def test_what_hydra_alone_notices_is_one_line_too(user):
    write(user, {"experiments/x.yaml": "defaults: [_self_, _self_]"})
    with pytest.raises(ConfigError, match="the defaults lists of experiment=x do not compose: .*_self_") as error:
        compose(["experiment=x"])
    assert "\n" not in str(error.value)


def test_a_plain_config_is_checked_without_origins(user):
    config = checked("experiment=small").config
    config["model"]["d_model"] = "x"
    with pytest.raises(ConfigError, match="^model.d_model: expected an int, got 'x'$"):
        check(config, root=_experiment())


# ----------------------------------------------------------------------- the environment


def test_values_of_the_environment_are_not_stored(user, monkeypatch):
    monkeypatch.setenv("LAB_SECRET", "s3cret")
    monkeypatch.setenv("LAB_NUMBER", "64")
    write(
        user,
        {
            "experiments/x.yaml": """
                run_dir: ${oc.env:LAB_SECRET}/runs
                model: {d_model: "${oc.decode:${oc.env:LAB_NUMBER}}", path: "${run_dir}"}
                task: {data: ["${oc.env:LAB_ABSENT,'a, b'}", "${oc.env:LAB_ABSENT,null}", "${oc.env:LAB_ABSENT,${seed}}"]}
                """
        },
    )
    composed = checked("experiment=x")
    config, stored = composed.config, composed.stored
    assert (config["run_dir"], config["model"]["d_model"], config["task"]["data"]) == ("s3cret/runs", 64, ["a, b", None, "42"])
    assert "s3cret" not in json.dumps(stored)
    assert stored["run_dir"] == stored["model"]["path"] == "${oc.env:LAB_SECRET}/runs"
    assert resolve(stored) == config
    assert override(stored, ["seed=1"]) == stored | {"seed": 1}
    monkeypatch.setenv("LAB_SECRET", "other")
    assert resolve(stored)["run_dir"] == "other/runs"
    monkeypatch.delenv("LAB_SECRET")
    with pytest.raises(ConfigError, match="needs the environment variable LAB_SECRET, which is not set"):
        resolve(stored)


def test_the_resolvers_are_put_back(user, monkeypatch):
    from omegaconf import OmegaConf

    monkeypatch.setenv("LAB_SECRET", "s3cret")
    with pytest.raises(ConfigError):
        compose(["run_dir=${oc.env:LAB_SECRET}", "seed=${nothing}"])
    compose(["run_dir=${oc.env:LAB_SECRET}"])
    assert OmegaConf.create({"a": "${oc.env:LAB_SECRET}"}).a == "s3cret"
    assert OmegaConf.create({"a": "${oc.decode:'[1]'}"}).a == [1]


def test_values_over_a_stored_config(user):
    stored = checked("experiment=small").stored
    assert override(stored, ["trainer.max_steps=7", "~callbacks.progress"])["trainer"]["max_steps"] == 7
    assert stored["trainer"]["max_steps"] == 100 and stored["callbacks"]
    for word in ("model=transformer", "experiment=small", "mixer@model.mixer=lattice"):
        with pytest.raises(ConfigError, match="a run keeps its own"):
            override(stored, [word])
    with pytest.raises(ConfigError, match="did you mean trainer.max_steps"):
        override(stored, ["trainr.max_steps=7"])


# ----------------------------------------------------------------------- where a value comes from


def test_explain_a_value(user, home):
    write(user, {"experiments/x.yaml": "seed: 1\nmodel:\n  d_model: 96"})
    assert explain("model.d_model", ["experiment=x", "model.d_model=32"]).splitlines() == [
        "model.d_model = 32",
        f"  128  {home}/configs/model/lot.yaml:8",
        "  96   experiments/x.yaml:3",
        "  32   command line",
    ]
    assert explain("model.vocab_size", []).splitlines() == [
        "model.vocab_size = 1000",
        f"  ${{task.vocab_size}}  {home}/configs/model/lot.yaml:7",
    ]
    assert explain("model.mixer.n_heads", ["mixer@model.mixer=attention"]).splitlines()[1] == f"  4  {home}/configs/mixer/attention.yaml:1"


def test_explain_a_node(user, home):
    lines = explain("trainer", ["experiment=small"]).splitlines()
    assert lines[0].split() == ["trainer._target_", "=", "toy.Settings", f"{home}/configs/trainer/default.yaml:1"]
    assert ["trainer.max_steps", "=", "100", f"{home}/experiments/small.yaml:5"] in [line.split() for line in lines]


def test_explain_an_unknown_key(user):
    with pytest.raises(ConfigError, match="did you mean model.d_model"):
        explain("model.dmodel", [])


@pytest.mark.parametrize(
    "words",
    [[], ["experiment=small"], ["model=transformer", "seed=3", "~callbacks.progress"], ["mixer@model.mixer=attention", "model.mixer={n_heads: 2}"]],
)
def test_the_layers_are_the_config(user, words):
    """The files and words that `explain` lists, merged, give every value of the config that Hydra composed."""
    values: dict = {}
    for layer in layers(words):
        for key, value in leaves(layer.tree):
            values = {k: v for k, v in values.items() if k[: len(key)] != key}
            values[key] = value
    values = {key: value for key, value in values.items() if value not in ({}, "(deleted)")}
    composed = {key: value for key, value in leaves(compose(words).config) if value != {}}
    assert {key: value for key, value in values.items() if "${" not in str(value)} == {
        key: value for key, value in composed.items() if "${" not in str(values.get(key))
    }
    assert set(values) == set(composed)


# ----------------------------------------------------------------------- building, and a config that is code


def test_build_gives_plain_containers_and_partials(user):
    model = build(checked("model.names={a: 1}", "model.sizes=[3,4.5]").config["model"])
    assert type(model).__name__ == "Model" and type(model.mixer).__name__ == "Lattice"
    assert type(model.sizes) is list and type(model.names) is dict
    assert build(None) is None
    assert [type(item).__name__ for item in build([{"_target_": "toy.Progress", "every": 1}])] == ["Progress"]


def test_what_a_constructor_raises_comes_through(user):
    node = checked("model=transformer", "model.d_model=6").config["model"]
    with pytest.raises(ValueError, match="^n_heads=4 does not divide d_model=6$"):
        build(node)


def test_build_refuses_a_second_interpolation(user):
    with pytest.raises(ConfigError, match=r"can contain the text \$\{"):
        build({"_target_": "toy.Task", "vocab_size": 1, "lengths": [], "data": r"\${oc.env:HOME}"})


def test_build_says_what_hydra_refuses(user):
    with pytest.raises(ConfigError, match="os.remove: Hydra refuses"):
        build({"_target_": "os.remove", "path": "x"})
    with pytest.raises(ConfigError, match="toy has no Tsk; did you mean Task"):
        build({"_target_": "toy.Tsk"})


UNTRUSTED = [
    "torch.load",
    "os.system",
    "builtins.eval",
    "builtins.exec",
    "subprocess.Popen",
    "hydra.utils.get_method",
    "hydra.utils.instantiate",
    "lab.config.files.yaml.unsafe_load",  # through a module of ours
    "lab.config.targets.importlib.import_module",
    "lab.models.base.torch.load",
    "lab.models.base.nn.Linear",  # a class, but not ours
    "lab.config.targets.build",  # ours, but a function
    "lab.training.resume",
    "lab.config.composition.Composed",  # ours and a class, but not of the parts that a config names
    "lab.load",
    "lab.models",  # a module
    "lab.models.Stack.forward",
    "labx.Thing",
    "evil.Thing",
    "pytorch_lightning.Trainer",
    "",
]


@pytest.mark.parametrize("target", UNTRUSTED)
@pytest.mark.parametrize(
    "place",
    [
        lambda node: node,
        lambda node: {"_target_": "lab.mixers.Attention", "_partial_": True, "n_heads": node},
        lambda node: {"a": [1, {"b": [node]}]},
        lambda node: {1: {"a": 0}, "1": node},
        lambda node: {"_target_": "lab.mixers.Attention", "_recursive_": False, "_args_": [node]},
    ],
    ids=["top", "argument", "list", "same name", "positional"],
)
def test_a_loaded_config_may_not_call(user, target, place):
    write(user, {"evil.py": "open('ran', 'w')\nclass Thing: ...", "labx.py": "open('ran', 'w')\nclass Thing: ..."})
    config = place({"_target_": target, "path": "x"})
    with pytest.raises(ConfigError, match="a config that was loaded may not call|is not the dotted name|has no") as error:
        build(config, trust=[])
    assert target in str(error.value)
    with pytest.raises(ConfigError):
        check(config, root=_experiment(), trust=["ev", "lab.config.target"])
    assert not (user / "ran").exists()
    assert "evil" not in sys.modules and "labx" not in sys.modules


def test_no_target_hides_in_an_interpolation(user, monkeypatch):
    monkeypatch.setenv("LAB_TARGET", "os.system")
    for target in ("${oc.env:LAB_TARGET}", "${oc.decode:os.system}", "${x}", r"\${oc.decode:os.system}"):
        with pytest.raises(ConfigError, match=r"may not call os.system|can contain the text \$\{"):
            build({"a": {"_target_": target, "command": "true"}, "x": "os.system"}, trust=[])


def test_what_is_trusted_is_built(user):
    node = {"_target_": "toy.Task", "vocab_size": 3, "lengths": [1], "data": {"_target_": "toy.Progress", "every": 1}}
    with pytest.raises(ConfigError, match="_target_: a config that was loaded may not call toy.Task; if you trust it, add --trust toy$"):
        build(node, trust=["to", "toy.Progress"])
    for prefix in ("toy", "toy."):
        assert type(build(node, trust=[prefix]).data).__name__ == "Progress"
    assert type(build(node).data).__name__ == "Progress"


@pytest.mark.parametrize(
    ("target", "arguments"),
    [("lab.mixers.Attention", {"d_model": 8, "n_heads": 2}), ("lab.training.AdamW", {}), ("lab.training.settings.Settings", {"max_steps": 1})],
)
def test_classes_of_lab_are_built(target, arguments):
    assert type(build({"_target_": target, **arguments}, trust=[])).__name__ == target.rpartition(".")[2]


# ----------------------------------------------------------------------- identity

CONFIG = {"model": {"_target_": "lab.models.Stack", "d_model": 64, "mixer": {"n": [1, 2]}}, "optimizer": {"lr": 3e-4}, "seed": 1,
          "trainer": {"devices": 1, "max_steps": 5}, "loss_weights": {}, "callbacks": {"progress": {"every": 1}}, "logger": {"a": 1}}  # fmt: skip


def changed(**values) -> dict:
    config = json.loads(json.dumps(CONFIG))
    for key, value in values.items():
        node = config
        *parents, last = key.split("__")
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return config


def test_the_hash_of_a_config_stays_what_it_is():
    assert config_hash(CONFIG) == "85f88e7c"


@pytest.mark.parametrize(
    "same",
    [
        {"trainer__devices": 4}, {"trainer__accelerator": "gpu"}, {"trainer__strategy": "ddp"}, {"trainer__num_workers": 3},
        {"trainer__log_every": 3}, {"trainer__checkpoint_every": 3}, {"logger": None}, {"callbacks__progress": None},
        {"callbacks__progress__every": 7}, {"run_dir": "x"}, {"resume": "x"}, {"fresh": True}, {"seed": 1.0},
    ],
)  # fmt: skip
def test_the_same_experiment(same):
    assert config_hash(changed(**same)) == config_hash(CONFIG)
    assert first_difference(changed(**same), CONFIG) is None


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"optimizer__lr": 1e-3}, "optimizer.lr: 0.001 here, 0.0003 in the run"),
        ({"model__mixer__n": [1, 3]}, "model.mixer.n: [1, 3] here, [1, 2] in the run"),
        ({"model__mixer__m": None}, "model.mixer.m: null here, not set in the run"),
        ({"model__d_model": "64"}, 'model.d_model: "64" here, 64 in the run'),
        ({"seed": True}, "seed: true here, 1 in the run"),
        ({"trainer__max_steps": 6}, "trainer.max_steps: 6 here, 5 in the run"),
        ({"trainer__devices_": 1}, "trainer.devices_: 1 here, not set in the run"),
        ({"loss_weights": {"sync": 1}}, "loss_weights.sync: 1 here, not set in the run"),
    ],
)
def test_another_experiment(other, sentence):
    assert config_hash(changed(**other)) != config_hash(CONFIG)
    assert first_difference(changed(**other), CONFIG) == sentence


def test_the_order_of_keys_is_no_difference():
    turned = dict(reversed([(key, dict(reversed(value.items())) if isinstance(value, dict) else value) for key, value in CONFIG.items()]))
    assert config_hash(turned) == config_hash(CONFIG) and first_difference(turned, CONFIG) is None


def test_a_key_that_only_the_run_has():
    assert first_difference(CONFIG, changed(model__extra=1)) == "model.extra: not set here, 1 in the run"


# ----------------------------------------------------------------------- the real configs

REAL = files.options()
WHOLE = {"trainer.max_steps=1", "task.vocab_size=8", "task.seq_len=8"}
NODE = "{_target_: builtins.list}"


def real_words() -> list[list[str]]:
    choices = [f"{group}={option}" for group, found in REAL.items() if group not in ("mixer", "experiment") for option in found]
    choices += [f"mixer@model.mixer={option}" for option in REAL["mixer"]] + [f"experiment={option}" for option in REAL["experiment"]]
    return [[choice, *sorted(WHOLE)] + [f"task.{split}={NODE}" for split in ("train", "val") if choice == "task=dataset"] for choice in choices]


@pytest.mark.parametrize("words", real_words(), ids=lambda words: words[0])
def test_every_option_of_lab_is_right(words, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    composed = compose(words)
    check(composed)
    check_late(composed)
    check(composed.stored, trust=["builtins"])


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("ops.kuramoto_scn=torch", ["ops.kuramoto_scn (command line)", "did you mean ops.kuramoto_scan?"]),
        ("ops.kuramoto_scan=torc", ["ops.kuramoto_scan (command line)", "did you mean torch?"]),
        ("ops.kuramoto_scan=3", ["expected a text, got 3"]),
        ("model.mixer.phase_mode=wav", ["model.mixer.phase_mode (command line)", "did you mean wave?"]),
        ("callbacks.progress.refresh_evry=1", ["did you mean callbacks.progress.refresh_every?"]),
        ("trainer.batchsize=4", ["trainer.batchsize (command line)", "did you mean trainer.batch_size?"]),
    ],
)
def test_mistakes_in_the_real_configs(word, parts, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(ConfigError) as error:
        composed = compose([word])
        check(composed)
        check_late(composed)
    for part in parts:
        assert part in str(error.value)


def test_no_key_of_a_real_config_is_said_twice():
    """An experiment repeats nothing that its options already say with the same value at the root: one home for each key."""
    for option in REAL["experiment"]:
        composed = compose([f"experiment={option}"])
        assert {key[0] for key, _ in places(composed.config)} <= {
            "model", "task", "trainer", "optimizer", "callbacks", "logger", "loss_weights", "ops", "seed", "run_dir", "resume", "fresh",
        }  # fmt: skip
