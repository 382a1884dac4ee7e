"""`match`: the size of a model is solved when its config is composed, and everything after that sees the solved value."""

from __future__ import annotations

import json

import pytest
import torch

import lab
from lab.analysis.cost import flops_per_token, params, state_bytes
from lab.cli.train import main
from lab.config import ConfigError, check, compose, config_hash
from lab.config.files import options
from lab.sweeps import comparison_words
from lab.sweeps.comparison import Plan
from lab.training.experiment import build_node

SMALL = "experiment=copy_reverse_small"
TO_PARAMS = ("match.by=params", "match.target=transformer")


def matched(*words):
    return compose([SMALL, *words])


def built(config):
    with torch.device("meta"):
        return build_node("model", config["model"], None)


WIDE = {"h3_attention": 0.07, "laminar": 0.22, "mamba_attention": 0.07, "transformer_seq2seq": 0.07}  # a step is of 8 or 16 channels
SIZES = ("tiny", "130m", "370m")  # of models that are there by their own name


QUICK = ("lot", "mamba", "s5", "transformer_seq2seq")
NAMES = sorted(name for name in options()["model"] if not name.endswith(SIZES))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NAMES])
def test_every_model_can_be_matched_to_the_transformer(name):
    more = ["task.source=true"] if name == "transformer_seq2seq" else ["model.n_layers=6"] if name == "h3_attention" else []
    tol = WIDE.get(name, 0.01)
    composed = matched(f"model={name}", *TO_PARAMS, f"match.tol={tol}", *more)
    check(composed)
    want = params(built(matched("model=transformer").config))
    assert abs(params(built(composed.config)) - want) <= tol * want


@pytest.mark.parametrize(
    ("by", "count"), [("flops", lambda model: flops_per_token(model, 64)), ("state", lambda model: state_bytes(model, 64))]
)
def test_operations_and_state_are_matched_too(by, count):
    composed = matched("model=mamba", f"match.by={by}", "match.target=transformer", "match.tol=2%")
    want = count(built(matched("model=transformer").config))
    assert abs(count(built(composed.config)) - want) <= 0.02 * want
    assert composed.config["model"]["d_model"] != matched("model=mamba").config["model"]["d_model"]


@pytest.mark.parametrize("target", ["100k", "0.1M", "100_000"])
def test_the_ways_to_write_a_number(target):
    assert matched("model=mamba", "match.by=params", f"match.target={target}").config["model"]["d_model"] == 79


def test_the_nearest_width_is_taken():
    def size(width):
        return params(built(matched("model=mamba", f"model.d_model={width}").config))

    width = matched("model=mamba", "match={by: params, target: 100k}").config["model"]["d_model"]
    assert abs(size(width) - 100_000) < min(abs(size(width - 1) - 100_000), abs(size(width + 1) - 100_000))


def test_a_model_matched_with_itself_stays_as_it_is():
    plain = matched("model=transformer")
    assert matched("model=transformer", *TO_PARAMS, "match.tol=0").config["model"] == plain.config["model"]


def test_another_knob():
    composed = matched("match.by=params", "match.target=1M", "match.knob=model.n_layers", "match.tol=3%")
    assert composed.config["model"]["n_layers"] == 20 and composed.config["model"]["d_model"] == 64
    composed = matched("model=lot", *TO_PARAMS, "match.knob=model.d_ff", "match.tol=0.1%")  # null, and so 256, before
    assert composed.config["model"]["d_ff"] == 252  # the transformer's parameters, to the last: 4 less in each of 2 layers is 2 * 4 * 129


def test_steps_that_a_constructor_refuses_are_no_candidates():
    words = ("model=transformer", "model.mixer.n_heads=6", "match.by=params", "match.target=300k", "match.tol=20%")
    assert matched(*words).config["model"]["d_model"] % 6 == 0


def test_other_values_of_the_config_follow():
    composed = matched("model=mamba", "model.d_ff=${model.d_model}", "match.by=params", "match.target=100k", "match.tol=2%")
    assert composed.config["model"]["d_ff"] == composed.config["model"]["d_model"] != 64
    assert abs(params(built(composed.config)) - 100_000) <= 2_000


def test_in_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "# @package _global_\ndefaults: [override /model: mamba, override /task: copy_reverse]\nmodel: {n_layers: 1}\n"
        "match: {by: params, target: 50k, tol: 3%}\n"
    )
    composed = compose([f"--config={file}"])
    assert abs(params(built(composed.config)) - 50_000) <= 1_500
    assert compose([f"--config={file}", "match=null"]).config["model"]["d_model"] == 256


def test_the_target_has_the_experiment_but_not_the_words_about_this_model():
    words = ("model=mamba", "model.n_layers=1", "model.mixer.d_state=4", "task.vocab_size=100", *TO_PARAMS)
    target = params(built(matched("model=transformer", "task.vocab_size=100").config))
    assert abs(params(built(matched(*words).config)) - target) <= 0.01 * target


# ----------------------------------------------------------------------- what sees it


def test_the_command_shows_what_was_solved_and_why(capsys):
    words = [SMALL, "model=mamba", "match.by=params", "match.target=100k"]
    assert main([*words, "--cfg", "job", "-p", "model.d_model"]) == 0 and capsys.readouterr().out.strip() == "79"
    assert main([*words, "--cfg", "job", "-p", "match"]) == 0
    assert capsys.readouterr().out.split() == ["by:", "params", "target:", "100k", "tol:", "1%", "knob:", "model.d_model"]
    assert main([*words, "--explain", "model.d_model"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "model.d_model = 79" and shown[-1].split(None, 1) == ["79", "match: 100,725 params"]
    assert "64   experiments/copy_reverse_small.yaml" in shown[-2].strip()


def test_without_match_nothing_is_built(command):
    done = command("lab-train", SMALL, "--cfg", "job")
    assert done.returncode == 0 and "match: null" in done.stdout
    import subprocess
    import sys

    code = f"import sys; from lab.config import compose; compose(['{SMALL}']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_same_experiment_as_the_value_itself():
    solved, typed = matched("model=mamba", "match.by=params", "match.target=100k"), matched("model=mamba", "model.d_model=79")
    assert config_hash(solved.stored) == config_hash(typed.stored)
    assert config_hash(solved.stored) != config_hash(matched("model=mamba").stored)


TRAINING = (
    "model.n_layers=1", "task.seq_len=8", "task.n_train=64", "task.n_val=8", "task.n_test=8", "task.free_samples=0", "model=mamba",
    "trainer.max_steps=2", "trainer.batch_size=8", "trainer.val_every=2", "trainer.accelerator=cpu", "~callbacks.progress",
    "~callbacks.state_spaces", "optimizer.warmup_steps=0", "match.by=params", "match.target=10k", "match.tol=5%",
)  # fmt: skip


def test_a_run_keeps_its_width(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = lab.train("copy_reverse_small", TRAINING, run_dir="run")
    width, stored = run.config()["model"]["d_model"], run.config()["match"]
    assert width != 64 and stored == {"by": "params", "target": "10k", "tol": "5%", "knob": "model.d_model"}
    assert run.metrics["params"] == params(run.model()) and abs(run.metrics["params"] - 10_000) <= 500
    assert run.metrics["cost"]["flops_per_token"] == flops_per_token(run.model(), 8)
    assert run.metrics["cost"]["state_bytes"] == {str(n): state_bytes(run.model(), n) for n in (8, 32, 128)}
    assert "match: by=params target=10k tol=5% knob=model.d_model gave the size of the model" in capsys.readouterr().out

    assert lab.train("copy_reverse_small", TRAINING, run_dir="run").path == run.path  # it is finished
    assert "is finished" in capsys.readouterr().out
    monkeypatch.setattr("lab.training.matching.solve", None)  # what goes on by a stored config solves nothing
    assert main(["resume=run", "trainer.max_steps=4"]) == 0
    assert run.config()["model"]["d_model"] == width and run.job()["step"] == 4


def test_the_jobs_of_a_comparison_are_matched_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sizes.yaml").write_text(
        "# @package _global_\ndefaults: [override /task: copy_reverse]\nmodels: [mamba, s4d, transformer]\n"
        "model: {n_layers: 2}\nmatch: {by: params, target: 200k, tol: 5%}\n"
    )
    plan = comparison_words.read(["sizes.yaml"])
    assert list(plan.models) == ["mamba", "s4d", "transformer"]
    jobs = {name: Plan([], plan.shared, tmp_path / "sweep", comparison=plan).job(words) for name, words in plan.models.items()}
    sizes = {name: params(built(job.composed.config)) for name, job in jobs.items()}
    assert all(abs(size - 200_000) <= 10_000 for size in sizes.values()), sizes
    assert len({job.path for job in jobs.values()}) == 3


# ----------------------------------------------------------------------- mistakes


def mistake(*words):
    with pytest.raises(ConfigError) as told:
        matched(*words)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_the_refusal_names_the_nearest_value():
    told = mistake("model=transformer", "match.by=params", "match.target=90k")
    nearest = params(built(matched("model=transformer", "model.d_model=56").config))
    share = f"{100 * abs(nearest - 90_000) / 90_000:.1f}%"
    assert told == (
        f"match (command line): no model.d_model of transformer comes within 1% of 90,000 params; the nearest is 56 with {nearest:,} "
        f"({share}); set match.tol=4%"
    )
    assert matched("model=transformer", "match.by=params", "match.target=90k", "match.tol=4%").config["model"]["d_model"] == 56


@pytest.mark.parametrize(("target", "nearest"), [("100", "8 with 3,472 (3372.0%)"), ("1e15", "65544 with")])
def test_a_target_out_of_reach(target, nearest):
    assert f"the nearest is {nearest}" in mistake("model=lot", "match.by=params", f"match.target={target}")


def test_a_classifier_has_no_state():
    with pytest.raises(ConfigError, match=r"match.by \(command line\): Stack has no state after 64 tokens here"):
        compose(["task=digits", "model=transformer", "match.by=state", "match.target=1M"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("match.by=param", "match.target=1M"), "match.by (command line): expected params, flops, state, got param; did you mean params?"),
        (("match.by=[params]", "match.target=1M"), "match.by (command line): expected params, flops, state, got ['params']"),
        (("match.by=params", "match.target=[1]"), "match.target (command line): [1] is neither a number, such as 1M, nor a model"),
        (("match.by=params", "match.target=1__000"), "match.target (command line): 1__000 is neither a number, such as 1M, nor a model"),
        (("match.by=params",), "match.target (command line): it is not set; it must be a number, as 1M, or the name of a model"),
        (("match.target=1M",), "match.by (command line): it is not set; it must be one of params, flops, state"),
        (("match.by=params", "match.target=transformr"), "a number, such as 1M, nor a model of configs/model; did you mean transformer?"),
        (("match.by=params", "match.target=0"), "match.target (command line): it must be above 0, got 0"),
        (("match.by=params", "match.target=1M", "match.tol=some"), "match.tol (command line): expected 0 or more, as 1% or 0.01, got some"),
        (("match.by=params", "match.target=1M", "match.to=1"), "match.to (command line): there is no such key; did you mean tol?"),
        (("match.by=params", "match.target=1M", "match.knob=model.dropout"), "expected a key of the model that holds an int"),
        (("match.by=params", "match.target=1M", "match.knob=seed"), "expected a key of the model that holds an int"),
        (("match.by=state", "match.target=1M", "match.knob=model.d_ff"), "the bytes of state of lot do not depend on model.d_ff"),
        (("match=params",), "match (command line): expected"),
        (("match.by=params", "match.target=1M", "model.d_model=96"), "model.d_model (command line): match solves it; leave one out"),
        (("match.by=params", "match.target=1M", "model={d_model: 96}"), "model.d_model (command line): match solves it; leave one out"),
        (("match.by=params", "match.target=1M", "model.n_layer=2"), "model.n_layer (command line): lab.models.Stack has no such argument"),
        (("match.by=params", "match.target=1M", "model.mixer.n_heads=0"), "n_heads=0"),
        (("match.by=params", "match.target=h3_attention"), "h3_attention cannot be a model of this experiment"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else "",
)  # fmt: skip
def test_a_mistake_is_one_sentence(words, sentence):
    assert sentence in mistake(*words)


def test_a_model_of_ones_own_that_reads_its_numbers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reader.py").write_text(
        "import torch\nfrom lab.mixers import Attention\n\n"
        "class Reader(Attention):\n"
        "    def __init__(self, d_model: int, n_heads: int = 2, dropout: float = 0.0) -> None:\n"
        "        super().__init__(d_model, n_heads, dropout)\n"
        "        float(self.q.weight.sum())\n"
    )
    told = mistake("model=transformer", "model.mixer._target_=reader.Reader", "match.by=params", "match.target=1M")
    assert "lot" not in told and "cannot be built or run without numbers, on torch's meta device" in told


def test_compose_can_leave_it_unsolved():
    words = [SMALL, "match.by=params", "match.target=1"]
    assert compose(words, matching=False).config["model"]["d_model"] == 64
    assert json.dumps(compose(words, matching=False).config["match"]) == '{"by": "params", "target": 1}'
