"""lab-eval and lab.load: everything is rebuilt from what the run stored, and nothing that was trained can be changed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import TINY
from omegaconf import OmegaConf

import lab
from lab.config import ConfigError, compose
from lab.ops import native
from lab.training import Run, RunError, evaluate_run, train

SCHEMA = (
    "task model checkpoint split step params cost metrics references published data by_length by_position config_hash code_version "
    "git_commit seed backends env"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        return train(compose([*TINY, "model=lot", "trainer.max_steps=6", "seed=3", "run_dir=run"])).path.resolve()


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of one trained run, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run", symlinks=True)
    return Run("run")


def test_evaluation_writes_one_schema(run):
    result, _ = evaluate_run("run", ["task.eval_lengths=[1,2]"], [])
    assert list(result) == SCHEMA
    assert json.loads((run.path / "eval" / "test-best.json").read_text()) == result == json.loads((run.path / "metrics.json").read_text())
    assert (result["task"], result["model"], result["checkpoint"], result["split"]) == ("copy_reverse", "lot", "best", "test")
    assert result["seed"] == 3 and result["backends"] == dict.fromkeys(("kuramoto_scan", "decode"), "native" if native.LIBRARY else "torch")
    assert set(result["metrics"]) == set("ce_loss token_accuracy exact_match exact_match_free sync diversity mean_sync_order".split())
    assert result["by_length"] == {"8": result["metrics"], "16": "not applicable (max_len 8)"}
    assert result["by_position"][:4] == [None] * 4 and all(0 <= value <= 1 for value in result["by_position"][4:])
    evaluate_run("run", ["split=val", "checkpoint=last"], [])
    assert (run.path / "eval" / "val-last.json").exists()


def test_the_command_says_that_a_run_is_not_finished(run, in_process, capsys):
    run.write_job("interrupted", reason="SIGTERM")
    assert in_process("lab-eval", "run") == 0
    said = capsys.readouterr().out
    assert "exact_match_free" in said and "length 8" in said and "the run is not finished, it is interrupted" in said


def test_longer_inputs_are_scored_where_the_model_takes_them(tiny):
    tiny("model=transformer", "model.position=none", "trainer.max_steps=2")
    result, _ = evaluate_run("run", ["task.eval_lengths=[1,2,4]"], [])
    assert [set(scores) for scores in result["by_length"].values()] == [set(result["metrics"])] * 3
    assert list(result["by_length"]) == ["8", "16", "32"]


def test_validation_by_lab_eval_is_that_of_training(run):
    logged = json.loads((run.path / "metrics.json").read_text())
    again, _ = evaluate_run("run", ["split=val"], [])
    for name in ("ce_loss", "token_accuracy", "exact_match", "sync"):
        assert again["metrics"][name] == pytest.approx(logged["metrics"][name], rel=1e-6)
    assert again["step"] == logged["step"] and again["by_position"] == pytest.approx(logged["by_position"])


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("model=transformer", "model cannot change in lab-eval"),
        ("model.d_model=4", "model.d_model cannot change in lab-eval"),
        ("task.seed=1", "task.seed cannot change in lab-eval"),
        ("spilt=val", r"^spilt cannot change in lab-eval; did you mean split\?$"),
        ("task.eval_length=[1]", r"cannot change in lab-eval; did you mean task.eval_lengths\?$"),
        ("trainer.batch_size=x", r"^trainer.batch_size \(command line\): expected an int, got 'x'"),
        ("split=tset", "split must be one of train, val, test, got 'tset'"),
        ("checkpoint=first", "checkpoint must be one of best, last, got 'first'"),
        ("ops.kuramoto_scan=fast", "kuramoto_scan has no backend fast"),
        ("task.eval_lengths=2", "task.eval_lengths"),
    ],
)
def test_what_was_trained_cannot_be_overridden(run, word, sentence):
    with pytest.raises(ConfigError, match=sentence):
        evaluate_run("run", [word], [])


def test_a_backend_can_be_forced(run):
    result, _ = evaluate_run("run", ["ops.kuramoto_scan=reference"], [])
    assert result["backends"]["kuramoto_scan"] == "reference"


def test_a_mistake_in_a_checkpoint_names_the_file(run, tmp_path):
    state = torch.load(run.last, weights_only=True)
    state["lab"]["config"]["model"]["mixer"]["n_heads"] = 3
    torch.save(state, tmp_path / "odd.ckpt")
    with pytest.raises(ConfigError, match=r"^model.mixer.n_heads \(odd.ckpt\): Attention: d_model=16 must be a multiple of n_heads=3"):
        lab.load("odd.ckpt")


def test_a_config_file_must_not_contradict_the_run(run, tmp_path):
    words = [*(word for word in TINY if not word.startswith("~")), "trainer.max_steps=6", "seed=3"]
    text = "# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.from_dotlist(words))
    (tmp_path / "mine.yaml").write_text(text)
    assert evaluate_run("run", [], [], "mine.yaml")[0]["split"] == "test"
    (tmp_path / "other.yaml").write_text(text.replace("d_model: 16", "d_model: 32"))
    with pytest.raises(ConfigError, match=r"--config other.yaml contradicts the run: model.d_model: 32 here, 16 in the run"):
        evaluate_run("run", [], [], "other.yaml")


def test_a_checkpoint_alone_is_enough(run, tmp_path):
    expected, task, config = lab.load("run")
    alone = tmp_path / "elsewhere" / "model.ckpt"
    alone.parent.mkdir()
    shutil.copy(run.best, alone)
    model, _, _ = lab.load(alone)
    tokens = task.split("test").batch(range(4)).inputs
    assert not model.training and torch.equal(model(tokens), expected(tokens))
    assert config["model"]["d_model"] == 16
    result, file = evaluate_run(str(alone), [], [])
    assert file == alone.parent / "model.test.json" and json.loads(file.read_text()) == result
    assert torch.equal(lab.load(run.path / "checkpoint.pt")[0](tokens), expected(tokens))


def test_loading_says_what_is_wrong(run, tmp_path):
    with pytest.raises(RunError, match="there is no such run folder"):
        lab.load("nothing")
    run.best.unlink()
    with pytest.raises(RunError, match="run has no checkpoint best.ckpt; it is done"):
        lab.load("run")
    assert lab.load("run", checkpoint="last")[1].seq_len == 8
    state = torch.load(run.last, weights_only=True)
    state["state_dict"].pop("model.head.weight")
    torch.save(state, tmp_path / "cut.ckpt")
    with pytest.raises(RunError, match=r"cut.ckpt: its weights do not fit the model of its config .*head.weight"):
        lab.load(tmp_path / "cut.ckpt")


@pytest.mark.parametrize(
    "target", ["torch.load", "os.system", "builtins.eval", "lab.tasks.base.np.load", "lab.training.load", "mine.Model"]
)
@pytest.mark.parametrize("place", ["model", "mixer", "task", "trainer"])
def test_a_stored_config_calls_nothing_foreign(run, tmp_path, target, place):
    """A config is code: whatever a run's config names, only lab's own classes are called."""
    state = torch.load(run.last, weights_only=True)
    config = state["lab"]["config"]
    node = {"_target_": target, "f": "x", "command": f"touch {tmp_path / 'executed'}"}
    if place == "mixer":
        config["model"]["mixer"] = node
    else:
        config[place] = node
    torch.save(state, tmp_path / "evil.ckpt")
    with pytest.raises(ConfigError, match=f"may not call {target};"):
        lab.load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "executed").exists()


def test_what_only_training_needs_is_not_built(run, tmp_path):
    state = torch.load(run.last, weights_only=True)
    state["lab"]["config"]["callbacks"] = {"x": {"_target_": "os.mkdir", "path": str(tmp_path / "executed")}}
    torch.save(state, tmp_path / "own.ckpt")
    lab.load(tmp_path / "own.ckpt")
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_file_is_not_a_choice_of_checkpoints(run):
    with pytest.raises(RunError, match="is a checkpoint itself: checkpoint=best chooses one of a run"):
        evaluate_run("run/checkpoints/last.ckpt", ["checkpoint=best"], [])


def test_a_double_precision_run_is_scored_in_double_precision(tiny):
    tiny("trainer.precision=64-true", "trainer.max_steps=1")
    model, _, _ = lab.load("run")
    assert next(model.parameters()).dtype == torch.float64


def test_a_users_own_data_set_needs_trust(tmp_path, monkeypatch, tiny):
    (tmp_path / "mine.py").write_text(
        "class Data:\n    def __len__(self):\n        return 32\n    def __getitem__(self, i):\n        return [i % 9, 3, 4], [3, 4, 5]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = [
        "task=dataset",
        *(f"+task.{split}._target_=mine.Data" for split in ("train", "val", "test")),
        "task.vocab_size=9",
        "task.seq_len=3",
    ]
    train(compose([*(word for word in TINY if not word.startswith("task.")), *own, "model=transformer", "run_dir=run"]))
    with pytest.raises(ConfigError, match="may not call mine.Data; if you trust it, add --trust mine"):
        lab.load("run")
    assert lab.load("run", trust=["mine"])[1].vocab_size == 9
    assert evaluate_run("run", [], ["mine"])[0]["split"] == "test"
