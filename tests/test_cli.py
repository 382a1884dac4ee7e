"""The commands: what they print, how they end, and what they do not import before they must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lab.training
from lab.cli import eval as lab_eval
from lab.cli import train as lab_train
from lab.config import Composed, ConfigError
from lab.ops import backend
from lab.training.run import Busy, Interrupted, RunError

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = "experiment=copy_reverse_small"
SCORES = {"exact_match": 0.98765, "mean_sync_order": None}
RESULT = {
    "model": "lot", "task": "copy_reverse", "split": "val", "checkpoint": "best", "step": 7, "metrics": SCORES,
    "references": {}, "data": {}, "by_length": {"32": SCORES, "64": "not applicable (max_len 32)"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def every_target_is_there(monkeypatch):
    monkeypatch.setattr("lab.training.run.Run.open", lambda path: None)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch):
    """What the commands hand over to lab.training, which does nothing here."""
    made = []
    for name in ("train", "resume", "evaluate_run"):
        monkeypatch.setattr(lab.training, name, lambda *a, _name=name: made.append((_name, *a)) or (RESULT, Path("x.json")), raising=False)
    return made


def fails(capsys, main, *words: str) -> tuple[int, str]:
    """The exit code, and the one line on stderr."""
    try:
        code = main(list(words))
    except SystemExit as error:  # argparse's
        code = error.code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n"), (out, err)
    return code, err.strip()


# ----------------------------------------------------------------------- lab-train


def test_train_gets_the_checked_config(calls):
    assert lab_train.main([SMALL, "optimizer.lr=1e-3"]) == 0
    ((name, composed),) = calls
    assert name == "train" and isinstance(composed, Composed)
    assert (composed.config["optimizer"]["lr"], composed.choices["experiment"]) == (1e-3, "copy_reverse_small")
    assert composed.overrides == [SMALL, "optimizer.lr=1e-3"]


@pytest.mark.parametrize("words", [["--config", "my files/x.yaml", "seed=3"], ["seed=3", "--config=my files/x.yaml"]])
def test_an_experiment_by_file(calls, tmp_path, words):
    (tmp_path / "my files").mkdir()
    (tmp_path / "my files/x.yaml").write_text("seed: 1\ntrainer: {max_steps: 5}")
    assert lab_train.main(words) == 0
    ((_, composed),) = calls
    assert (composed.config["seed"], composed.config["trainer"]["max_steps"], composed.choices["experiment"]) == (3, 5, "x")


@pytest.mark.parametrize(
    ("words", "trust"),
    [
        (["resume=runs/a b", "trainer.max_steps=7"], []),
        (["trainer.max_steps=7", "+resume='runs/a b'", "--trust", "mine"], ["mine"]),
    ],
)
def test_resume_composes_nothing(calls, words, trust):
    assert lab_train.main(words) == 0
    assert calls == [("resume", "runs/a b", ["trainer.max_steps=7"], trust)]


def test_resume_null_is_no_resume(calls):
    assert lab_train.main([SMALL, "resume=null"]) == 0
    assert calls[0][0] == "train"


def test_the_printed_config_is_yaml_and_resolved(calls, capsys):
    assert lab_train.main([SMALL, "task.vocab_size=48", "optimizer.lr=2e-3", "--cfg", "job"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["vocab_size"] == 48 and config["optimizer"]["lr"] == 2e-3
    assert lab_train.main([SMALL, "--cfg", "job", "-p", "model.mixer"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == config["model"]["mixer"]
    assert lab_train.main([SMALL, "--cfg", "job", "--package", "seed"]) == 0
    assert capsys.readouterr().out == "42\n"
    assert calls == []


def test_a_printed_config_is_an_experiment(calls, capsys, tmp_path):
    assert lab_train.main([SMALL, "model=transformer", "--cfg", "job"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "x.yaml").write_text("defaults: [override /model: transformer]\n" + printed)
    assert lab_train.main(["--config", "x.yaml", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed)


@pytest.mark.parametrize("group", ["callbacks", "logger"])
def test_a_group_that_a_config_can_do_without(calls, capsys, group):
    assert lab_train.main([SMALL, "--cfg", "job"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    code, line = fails(capsys, lab_train.main, SMALL, f"{group}=null", "--cfg", "job")
    assert code == 2 and line.endswith(f"; ~{group} goes without")
    assert lab_train.main([SMALL, f"~{group}", "--cfg", "job"]) == 0
    assert config.pop(group) and yaml.safe_load(capsys.readouterr().out) == config
    assert lab_train.main([SMALL, f"~{group}"]) == 0


def test_a_data_set_given_as_the_sentence_says(calls, capsys, tmp_path):
    (tmp_path / "mydata.py").write_text("class Data: ...")
    words = ["task=dataset", "task.vocab_size=8", "task.seq_len=4", "task.val._target_=mydata.Data"]
    code, line = fails(capsys, lab_train.main, *words)
    assert code == 2 and "task.train (" in line and "dataset.yaml:" in line
    assert "it must be a node such as +task.train._target_=yourmodule.Class, or a plain value" in line
    assert lab_train.main([*words, "+task.train._target_=mydata.Data"]) == 0
    assert calls[0][1].config["task"]["train"] == {"_target_": "mydata.Data"}


def test_an_op_of_the_users_mixer_is_known(calls, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "_ops", dict(backend._ops))
    monkeypatch.setattr(backend, "_used", dict(backend._used))
    assert "there is no such op" in fails(capsys, lab_train.main, SMALL, "ops.mine=fast")[1]
    (tmp_path / "mymixer.py").write_text(
        "from lab.mixers import Attention\nfrom lab.ops.backend import Backend, Op\n"
        "Op('mine', (Backend('fast', print),))\nclass Mixer(Attention): ..."
    )
    mine = [SMALL, "model=transformer", "model.mixer._target_=mymixer.Mixer"]
    assert lab_train.main([*mine, "ops.mine=fast"]) == 0
    assert "mine has no backend fats; did you mean fast?" in fails(capsys, lab_train.main, *mine, "ops.mine=fats")[1]


def test_explain(capsys):
    assert lab_train.main(["--explain", "model.d_model", SMALL, "model.d_model=96"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert (first, last.split()) == ("model.d_model = 96", ["96", "command", "line"])


def test_help_is_ours_and_hydras_is_hydras(capsys):
    with pytest.raises(SystemExit) as end:
        lab_train.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "examples:" in text and SMALL in text and "--hydra-help" in text and "hydra.run.dir" not in text
    assert "ablation/lattice" in text and "copy_reverse_small" in text and "lab-train -m" in text
    assert lab_train.main(["--hydra-help"]) == 0
    assert "--multirun" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        lab_eval.main(["--help"])
    assert "lab-eval RUN_OR_CHECKPOINT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=transfomer"], "did you mean transformer?"),
        ([SMALL, "model.n_layer=3"], "model.n_layer (command line): lab.models.Stack has no such argument; did you mean model.n_layers?"),
        ([SMALL, "--confg", "x"], "did you mean --config?"),
        ([SMALL, "--cfg", "jb"], "invalid choice: 'jb'"),
        ([SMALL, "--cfg", "job", "-p", "model.dmodel"], "did you mean model.d_model?"),
        ([SMALL, "-p", "model"], "--package belongs to --cfg job"),
        ([SMALL, "--explain", "model.dmodel"], "did you mean model.d_model?"),
        ([SMALL, "seed=1,2"], "seed (command line): 1,2 is several values, which -m trains one by one"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["resume=runs/a", "--cfg", "job"], "resume=runs/a goes on by the config that the run stored; read it in runs/a/config.yaml"),
        (["+resume=runs/a/", "--explain", "seed"], "read it in runs/a/config.yaml"),
        (["resume=a", "--config", "x.yaml"], "leave out --config"),
        (["resume=a", "resume=b"], "a second resume="),
        ([SMALL, "--trust", "x"], "--trust belongs to resume=RUN"),
        ([SMALL, "--config"], "argument --config: expected one argument"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(calls, capsys, words, sentence):
    code, line = fails(capsys, lab_train.main, *words)
    assert code == 2 and line.startswith("lab-train: ") and sentence in line
    assert calls == []


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ConfigError("optimizer: lr is odd"), 2, "lab-train: optimizer: lr is odd"),
        (RunError("the loss is NaN at step 3"), 1, "lab-train: the loss is NaN at step 3"),
        (Interrupted("stopped by SIGTERM at step 3", 15), 143, "lab-train: stopped by SIGTERM at step 3"),
        (Interrupted("stopped by SIGINT at step 3", 2), 130, "lab-train: stopped by SIGINT at step 3"),
        (KeyboardInterrupt(), 130, "lab-train: interrupted"),
        (Busy("another process writes this run"), 75, "lab-train: another process writes this run"),
        (PermissionError(13, "Permission denied", "/no/entry"), 1, "lab-train: /no/entry: Permission denied"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, sentence):
    def train(composed):
        raise error

    monkeypatch.setattr(lab.training, "train", train, raising=False)
    assert fails(capsys, lab_train.main, SMALL) == (code, sentence)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("a bug without a file")])
def test_a_bug_is_a_traceback(monkeypatch, error):
    def train(composed):
        raise error

    monkeypatch.setattr(lab.training, "train", train, raising=False)
    with pytest.raises(type(error), match="a bug"):
        lab_train.main([SMALL])


# ----------------------------------------------------------------------- lab-eval


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["runs/a"], ("runs/a", [], [], None)),
        (
            ["runs/a", "split=val", "task.eval_lengths=[1,2]", "--trust", "mine", "--trust", "yours", "--config", "x.yaml", "seed=1"],
            ("runs/a", ["split=val", "task.eval_lengths=[1,2]", "seed=1"], ["mine", "yours"], "x.yaml"),
        ),
        (["--trust", "mine", "runs/a", "split=val"], ("runs/a", ["split=val"], ["mine"], None)),
    ],
)
def test_eval_hands_over(calls, capsys, words, arguments):
    assert lab_eval.main([*words, "--json"]) == 0
    assert calls == [("evaluate_run", *arguments)]
    assert json.loads(capsys.readouterr().out) == RESULT


def test_eval_prints_a_table(calls, capsys):
    assert lab_eval.main(["runs/a"]) == 0
    text = capsys.readouterr().out
    for part in ("lot on copy_reverse, val split", "length 32", "0.9877", "length 64: not applicable (max_len 32)", "written to x.json"):
        assert part in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the following arguments are required: RUN_OR_CHECKPOINT (lab-eval --help"),
        (["split=val"], "split=val: the run or checkpoint comes first"),
        (["runs/a", "--trst", "x"], "did you mean --trust?"),
    ],
)
def test_mistakes_of_eval(calls, capsys, words, sentence):
    code, line = fails(capsys, lab_eval.main, *words)
    assert code == 2 and line.startswith("lab-eval: ") and sentence in line
    assert calls == []


# ----------------------------------------------------------------------- start-up

HEAVY = ("torch", "pytorch_lightning", "torchmetrics", "tensorboard")
PROGRAM = """
import json, sys
from lab.cli.train import main
try:
    code = main(sys.argv[1:])
except SystemExit as error:
    code = error.code
print(json.dumps({"code": code, "modules": sorted({name.partition(".")[0] for name in sys.modules})}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "code", "absent"),
    [
        (["--help"], 0, (*HEAVY, "hydra", "omegaconf")),
        ([SMALL, "--cfg", "job"], 0, HEAVY),
        ([SMALL, "--explain", "model"], 0, HEAVY),
        (["model=transfomer"], 2, HEAVY),
        (["experiment=copy_reverse_smal"], 2, HEAVY),
        (["mixer@model.mixer=latice"], 2, HEAVY),
        (["modle=lot"], 2, HEAVY),
        ([SMALL, "model.n_layer=3"], 2, HEAVY[1:]),
        ([SMALL, "trainer.max_steps=soon"], 2, HEAVY[1:]),
        ([SMALL, "ops.kuramoto_scan=torc"], 2, HEAVY[1:]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nothing_heavy_is_imported_before_it_must(words, code, absent):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    report = json.loads(done.stderr.splitlines()[-1])
    assert report["code"] == code
    assert not set(absent) & set(report["modules"])


@pytest.mark.parametrize("module", ["lab.config", "torch"])
@pytest.mark.parametrize(("command", "word"), [("train", SMALL), ("eval", __file__)])
def test_ctrl_c_during_the_imports(command, word, module):
    """Also where the imported module swallows the exception, as numpy does."""
    program = f"""if True:
        import contextlib, signal, sys
        class Finder:
            def find_spec(self, name, path=None, target=None):
                with contextlib.suppress(KeyboardInterrupt):
                    if name == {module!r}:
                        signal.raise_signal(signal.SIGINT)
        sys.meta_path.insert(0, Finder())
        from lab.cli.{command} import main
        sys.exit(main([{word!r}]))"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"lab-{command}: interrupted\n")


def test_nobody_reads_on():
    """As of `lab-train --cfg job | head -1` where head is the faster: quiet, and the exit code that a shell gives for SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "lab.cli.train", SMALL, "--cfg", "job"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


GONE = [["lab-eval", "gone"], ["lab-export", "gone"], ["lab-generate", "gone", "--prompt", "1"], ["lab-train", "resume=gone"]]


@pytest.mark.parametrize("words", GONE, ids=lambda words: words[0])
def test_a_run_that_is_not_there_is_told_without_torch(words, tmp_path):
    module = f"lab.cli.{words[0].removeprefix('lab-')}"
    program = f"import sys; from {module} import main; code = main({words[1:]!r}); sys.exit(9 if 'torch' in sys.modules else code)"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, f"{words[0]}: gone: there is no such run folder\n")
