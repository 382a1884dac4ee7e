"""Composition of a config, where its values come from, what is stored of it, and what makes two of them the same experiment."""

from __future__ import annotations

import json
from pathlib import Path

import config_tree
import pytest
from config_tree import HOME, checked, message, write

from lab.config import ConfigError, build, check, check_late, compose, config_hash, explain, files, first_difference, override, resolve
from lab.config.tree import leaves

home, user = config_tree.home, config_tree.user  # fixtures
REPOSITORY = Path(__file__).resolve().parents[1]


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
    assert stored["run_dir"] == "${oc.env:LAB_SECRET}/runs" and stored["model"]["path"] == "${run_dir}"  # as written
    write(user, {"config.yaml": json.dumps(stored)})
    assert resolve(stored) == config
    assert override(stored, ["seed=1"], Path("config.yaml"), {}).stored == stored | {"seed": 1}
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
    write(user, {"config.yaml": json.dumps(stored)})
    assert override(stored, ["trainer.max_steps=7", "~callbacks.progress"], Path("config.yaml"), {}).config["trainer"]["max_steps"] == 7
    assert stored["trainer"]["max_steps"] == 100 and stored["callbacks"]
    for word in ("model=transformer", "experiment=small", "mixer@model.mixer=lattice"):
        with pytest.raises(ConfigError, match="a run keeps its own"):
            override(stored, [word], Path("config.yaml"), {})
    with pytest.raises(ConfigError, match="did you mean trainer.max_steps"):
        override(stored, ["trainr.max_steps=7"], Path("config.yaml"), {})


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
    [
        [],
        ["experiment=small"],
        ["model=transformer", "seed=3", "~callbacks.progress"],
        ["mixer@model.mixer=attention", "model.mixer={n_heads: 2}"],
    ],
)
def test_the_layers_are_the_config(user, words):
    """The files and words that `explain` lists, merged, give every value of the config that Hydra composed."""
    values: dict = {}
    for layer in compose(words).layers:
        for key, value in leaves(layer.tree) if layer.tree else ():
            values = {k: v for k, v in values.items() if k[: len(key)] != key}
            values[key] = value
    values = {key: value for key, value in values.items() if value not in ({}, "(deleted)")}
    composed = {key: value for key, value in leaves(compose(words).config) if value != {}}
    assert {key: value for key, value in values.items() if "${" not in str(value)} == {
        key: value for key, value in composed.items() if "${" not in str(values.get(key))
    }
    assert set(values) == set(composed)


# ----------------------------------------------------------------------- identity

CONFIG = {
    "model": {"_target_": "lab.models.Stack", "d_model": 64, "mixer": {"n": [1, 2]}},
    "optimizer": {"lr": 3e-4},
    "trainer": {"devices": 1, "max_steps": 5},
    "loss_weights": {},
    "callbacks": {"bar": {"_target_": "lab.training.Progress", "every": 1}},
    "logger": {"a": 1},
    "seed": 1,
}


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
    assert config_hash(CONFIG) == "0b4c149e"


@pytest.mark.parametrize(
    "same",
    [
        {"trainer__devices": 4}, {"trainer__accelerator": "gpu"}, {"trainer__strategy": "ddp"}, {"trainer__num_workers": 3},
        {"trainer__reuse_memory": True}, {"trainer__log_every": 3}, {"trainer__checkpoint_every": 3}, {"logger": None},
        {"callbacks__bar": None}, {"callbacks__bar__every": 7}, {"run_dir": "x"}, {"resume": "x"}, {"fresh": True},
        {"seed": 1.0}, {"callbacks": {}},
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
DATA = "{_target_: builtins.list}"  # a data set that has nothing to check


def real_words() -> list[list[str]]:
    """A command line for each option of each group, and for each experiment."""
    keys, inside = {"mixer": "mixer@model.mixer"}, {"ssm_layer": ["model=h3"]}
    small = ["trainer.max_steps=1", "task.vocab_size=8", "task.seq_len=8", "match=null"]
    words = [[f"{keys.get(group, group)}={option}", *inside.get(group, ()), *small] for group, found in REAL.items() for option in found]
    words = [[word for word in line if "enwik8" not in line[0] or "vocab_size" not in word] for line in words]  # its tokens are given
    return [[*line, f"task.train={DATA}", f"task.val={DATA}"] if line[0] == "task=dataset" else line for line in words]


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


def test_a_callback_is_another_experiment_by_what_it_is_not_by_its_name():
    assert config_hash(changed(callbacks__phases={"_target_": "mine.ChangesTraining"})) != config_hash(CONFIG)
