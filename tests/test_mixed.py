"""Stacks whose layers have different mixers: by name and pattern, as configs/model/mamba_attention.yaml, or by a list."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import tensors
from test_models import V, conform, random_tokens

from lab.config import ConfigError, check, compose
from lab.config.explanation import explain
from lab.mixers import Attention, Lattice, MambaLayer, S4DLayer
from lab.models import Stack
from lab.training import Run, resume, train

NAMED = {"ssm": partial(MambaLayer, d_state=4), "lattice": partial(Lattice, n_heads=2), "attention": partial(Attention, n_heads=2)}
SHORT = (
    "task.vocab_size=12", "task.seq_len=8", "task.n_train=70", "task.n_val=12", "task.n_test=10", "task.free_samples=4",
    "trainer.max_steps=6", "trainer.batch_size=8", "trainer.val_every=3", "trainer.checkpoint_every=3", "trainer.accelerator=cpu",
    "~callbacks.progress", "model.n_layers=4", "model.d_model=16",
)  # fmt: skip
LIST = """# @package _global_
model:
  _target_: lab.models.Stack
  vocab_size: ${task.vocab_size}
  d_model: 16
  n_layers: 2
  position: none
  mixer:
    - {_target_: lab.mixers.MambaLayer, _partial_: true, d_state: 4}
    - {_target_: lab.mixers.Attention, _partial_: true, n_heads: 2}
loss_weights: {}
"""


def stack(mixer, n_layers: int = 3, **options) -> Stack:
    return Stack(V, 16, n_layers, mixer, position="none", **options)


def kinds(model) -> list[str]:
    return [type(layer).__name__ for layer in model.mixers]


def test_a_list_is_used_in_turn_and_a_pattern_by_name():
    assert kinds(stack([NAMED["ssm"], NAMED["attention"]], 4)) == ["MambaLayer", "Attention"] * 2
    assert kinds(stack(NAMED, 6, pattern=["ssm", "ssm", "lattice"])) == ["MambaLayer", "MambaLayer", "Lattice"] * 2
    assert kinds(stack(NAMED, 2, pattern=("attention", "ssm"))) == ["Attention", "MambaLayer"]


@pytest.mark.parametrize("pattern", [["ssm", "lattice", "attention"], ["lattice", "ssm", "lattice"]])
def test_mixed_stacks_conform(pattern):
    """States of different kinds, and losses that only some layers have."""
    conform(lambda: stack(NAMED, pattern=pattern))


def test_losses_and_records_are_those_of_the_layers_that_have_them():
    model = stack(NAMED, pattern=["ssm", "lattice", "lattice"]).eval()
    assert model.loss_names == ("sync", "diversity")
    out = model(random_tokens(), want=("losses", "record"))
    assert [layer is None for layer in out.record["theta"]] == [layer is None for layer in out.record["omega"]] == [True, False, False]
    torch.testing.assert_close(out.losses["sync"], torch.stack([1 - r.mean() for r in out.record["sync_order"][1:]]).mean())
    assert model.derived_metrics(out.losses) == {"sync_order": 1 - out.losses["sync"]}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mixer": NAMED}, "pattern is missing; it says which of ssm, lattice, attention each layer has, such as"),
        ({"mixer": NAMED, "pattern": ["ssm", "latice"]}, r"pattern has latice, but there is no mixer of that name; did you mean lattice\?"),
        ({"mixer": NAMED, "pattern": ["ssm", "ssm"]}, "n_layers=3 must be a multiple of the length of pattern, 2, which repeats"),
        ({"mixer": NAMED, "pattern": []}, "pattern is empty; it must say which mixer the layers have"),
        ({"mixer": []}, "mixer is empty; it must say which mixer the layers have"),
        ({"mixer": [S4DLayer] * 6}, "n_layers=3 must be a multiple of the length of mixer, 6"),
        ({"mixer": S4DLayer, "pattern": ["ssm"]}, "pattern chooses among mixers that have names, and here mixer has none"),
    ],
)
def test_mistakes_are_told(arguments, sentence):
    with pytest.raises(ValueError, match=f"^Stack: {sentence}"):
        stack(**arguments)


# In YAML


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "mine.yaml").write_text(LIST)
    (tmp_path / "named.yaml").write_text("model: {mixer: {attention: {n_heads: 4}}}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_are_reached_by_words_files_and_options(folder):
    words = ["--config=named.yaml", "model=mamba_attention", "model.mixer.mamba.d_state=4", "mixer@model.mixer.attention=lattice"]
    composed = compose(words)
    check(composed)
    mixer = composed.config["model"]["mixer"]
    assert mixer["mamba"]["d_state"] == 4 and mixer["attention"]["n_heads"] == 4
    assert mixer["attention"]["_target_"] == "lab.mixers.Lattice" and composed.config["model"]["pattern"] == ["mamba", "attention"]
    assert [line.split() for line in explain("model.mixer.attention.n_heads", words).splitlines()[-1:]] == [["4", "named.yaml:1"]]


def test_items_of_a_list_are_reached_by_number(folder):
    words = ["model=mine", "model.mixer.1.n_heads=4"]
    composed = compose(words)
    check(composed)
    assert composed.config["model"]["mixer"][1]["n_heads"] == 4
    assert explain("model.mixer.1.n_heads", words).splitlines()[1:] == ["  2  configs/model/mine.yaml:10", "  4  command line"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=mamba_attention", "model.mixer.attention.n_head=2"], r"did you mean model.mixer.attention.n_heads\?"),
        (["model=mamba_attention", "mixer@model.mixer=mamba"], "did you mean mixer@model.mixer.attention=mamba"),
        (["model=mamba_attention", "mixer@model.mixer.attention=latice"], r"did you mean lattice\?"),
        (["model=mamba_attention", "model.pattern=mamba"], r"^model.pattern \(command line\): expected a list \(a text each\) or null"),
        (["model=mine", "model.mixer.1.n_head=2"], r"^model.mixer.1.n_head \(command line\): .* did you mean model.mixer.1.n_heads\?"),
        (["model=mine", "model.mixer.0._target_=lab.tasks.CopyReverse"], r"^model.mixer.0 \(command line\): expected a node with _target_"),
    ],
)
def test_mistakes_in_yaml_are_told(folder, words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check(compose(words))


def test_a_mistake_between_two_values_names_one_of_them(folder):
    with pytest.raises(ConfigError, match=r"^model.n_layers \(command line\): Stack: n_layers=3 must be a multiple of .* pattern, 2"):
        train(compose([*SHORT, "model=mamba_attention", "model.n_layers=3"]))


@pytest.mark.parametrize("kind", ["s4d", "s5"])
def test_a_layer_that_reads_the_future_is_refused_where_the_next_token_is_the_target(folder, kind):
    words = [*SHORT, "model=mamba_attention", f"mixer@model.mixer.mamba={kind}", "model.mixer.mamba.bidirectional=true"]
    with pytest.raises(ConfigError) as error:
        train(compose(words))
    assert str(error.value) == (
        "model.mixer.mamba.bidirectional (command line): the model reads the future, and task CopyReverse predicts the next token; "
        "it must be false"
    )
    assert not (folder / "runs").exists()
    train(compose([*words, "model.mixer.mamba.bidirectional=false", "trainer.max_steps=1"]))


def test_a_mixer_of_the_users_own_that_reads_the_future(folder, monkeypatch):
    (folder / "future.py").write_text("import lab\nclass Mean(lab.mixers.Attention):\n    causal = False\n")
    monkeypatch.syspath_prepend(folder)
    own = ["model=transformer", "+model.mixer._target_=future.Mean"]
    with pytest.raises(ConfigError, match=r"^model \(.*: the model reads the future, and task CopyReverse predicts the next token$"):
        train(compose([*SHORT, *own]))


@pytest.mark.parametrize("model", ["mamba_attention", "mine"])
def test_a_run_resumes_to_the_same_weights(folder, model):
    words = [*SHORT, f"model={model}"]
    train(compose([*words, "optimizer.schedule=constant", "trainer.max_steps=3", "run_dir=part"]))
    train(compose([*words, "optimizer.schedule=constant", "run_dir=constant"]))
    run = resume("part", ["trainer.max_steps=6"], [])
    assert run.job()["status"] == "done"
    a, b = tensors(run.last), tensors(Run("constant").last)
    assert all(torch.equal(a[name], b[name]) for name in b if name.startswith("/state_dict"))
