"""Building what a node describes, and a config as code: what one that was loaded may not call."""

from __future__ import annotations

import sys

import config_tree
import pytest
from config_tree import checked, toy_root, write

from lab.config import ConfigError, build, check, check_late

home, user = config_tree.home, config_tree.user  # fixtures


def test_build_gives_plain_containers_and_partials(user):
    model = build(checked("model.names={a: 1}", "model.sizes=[3,4.5]").config["model"])
    assert type(model).__name__ == "Model" and type(model.mixer).__name__ == "Lattice"
    assert type(model.sizes) is list and type(model.names) is dict
    assert build(None) is None
    assert [type(item).__name__ for item in build([{"_target_": "toy.Progress", "every": 1}])] == ["Progress"]


def test_modules_of_the_current_folder_come_last(user):
    write(user, {"alone.py": "class Thing: ...", "statistics.py": "class NormalDist: ..."})
    assert type(build({"_target_": "alone.Thing"})).__name__ == "Thing"
    assert sys.path[-1] == str(user)
    sys.modules.pop("statistics", None)
    assert build({"_target_": "statistics.NormalDist", "mu": 3}).mean == 3  # not the one of the current folder


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
    assert not str(error.value).endswith("--trust lab")
    assert not (user / "ran").exists()
    assert "evil" not in sys.modules and "labx" not in sys.modules


def test_a_loaded_config_is_checked_without_importing_strangers(user):
    write(user, {"evil.py": "open('ran', 'w')\nclass Thing: ..."})
    config = checked().config | {"callbacks": [{"_target_": "evil.Thing"}]}
    for look in (check, check_late):
        with pytest.raises(ConfigError, match="callbacks.0._target_: a config that was loaded may not call evil.Thing"):
            look(config, root=toy_root(), trust=["toy", "ev"])
    assert not (user / "ran").exists()


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
    [
        ("lab.mixers.Attention", {"d_model": 8, "n_heads": 2}),
        ("lab.training.AdamW", {}),
        ("lab.training.settings.Settings", {"max_steps": 1}),
    ],
)
def test_classes_of_lab_are_built(target, arguments):
    assert type(build({"_target_": target, **arguments}, trust=[])).__name__ == target.rpartition(".")[2]
