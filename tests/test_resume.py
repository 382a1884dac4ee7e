"""Runs that are killed, stopped or full: nothing is lost, and what was continued equals what was never stopped, bit by bit."""

from __future__ import annotations

import fcntl
import math
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import KILLER, TINY, rows, tensors

from lab.config import ConfigError, compose
from lab.training import Run, RunError, resume, train
from lab.training.checkpoint import AtomicCheckpointIO, read_checkpoint

STATEFUL = (*TINY, "trainer.accumulate=2", "trainer.ema=0.9", "+callbacks.killer._target_=killer.Killer")


@pytest.fixture
def killer(tmp_path, monkeypatch):
    (tmp_path / "killer.py").write_text(KILLER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def words(step, number=9, *more):
    return [*STATEFUL, f"+callbacks.killer.step={step}", f"+callbacks.killer.number={number}", *more]


@pytest.mark.parametrize(
    ("number", "at", "workers", "code"),
    [
        (signal.SIGKILL, 8, 0, -9),  # between two checkpoints, in the second epoch
        pytest.param(signal.SIGKILL, 3, 2, -9, marks=pytest.mark.slow),  # before the first checkpoint
        pytest.param(signal.SIGKILL, 11, 2, -9, marks=pytest.mark.slow),
        (signal.SIGTERM, 7, 2, 143),
        pytest.param(signal.SIGINT, 5, 0, 130, marks=pytest.mark.slow),  # a step before a validation: the save waits for it
    ],
)
def test_a_killed_run_goes_on_bit_by_bit(killer, command, number, at, workers, code):
    whole = train(compose([*words(10**6), "run_dir=whole"]))
    line = words(at, int(number), f"trainer.num_workers={workers}", "run_dir=run")
    done = command("lab-train", *line, cwd=killer)
    assert done.returncode == code, done.stderr
    run = Run("run")
    assert run.job()["status"] == "interrupted"
    assert ("killed" if number == signal.SIGKILL else number.name) in run.job()["reason"]
    train(compose(line))
    assert run.job() | {"status": "done", "step": 12, "reason": None} == run.job()
    expected, got = tensors(whole.last), tensors(run.last)
    assert expected.keys() == got.keys() and any("averag" in name for name in got) and any("random_states" in name for name in got)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    drop = {"train/tokens_per_second", "train/seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in rows("run")] == [
        {k: v for k, v in row.items() if k not in drop} for row in rows("whole")
    ]
    seconds = [row["train/seconds"] for row in rows("run") if "train/seconds" in row]
    assert len(seconds) > 1 and seconds == sorted(seconds) and seconds[0] > 0  # they go on where the checkpoint stood
    assert [row["train/tokens"] for row in rows("run") if "train/tokens" in row][-1] == 12 * 8 * 16


def test_resume_by_the_stored_config_alone(killer, command):
    whole = train(compose([*words(10**6), "run_dir=whole"]))
    assert command("lab-train", *words(8), "run_dir=run", cwd=killer).returncode == -9
    with pytest.raises(Exception, match="may not call killer.Killer; if you trust it, add --trust killer"):
        resume("run", [], trust=[])
    resume("run", ["trainer.num_workers=1"], trust=["killer"])
    expected, got = tensors(whole.last), tensors("run/checkpoints/last.ckpt")
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_a_longer_training_goes_on_with_its_schedule(tiny, capsys):
    run = tiny("trainer.max_steps=6")
    resume("run", ["trainer.max_steps=9"], trust=[])
    assert "schedule of the learning rate is now that of 9 steps" in capsys.readouterr().out
    assert run.job()["step"] == 9 and run.config()["trainer"]["max_steps"] == 9
    assert run.hparams()["resumed"][0]["with"] == ["trainer.max_steps=9"]
    rates = [row["train/lr"] for row in rows("run") if "train/lr" in row]
    assert rates[6] == pytest.approx(compose([*TINY]).config["optimizer"]["lr"] * 0.5 * (1 + math.cos(math.pi * 6 / 9)))
    resume("run", ["trainer.max_steps=9"], trust=[])
    assert "is finished at step 9" in capsys.readouterr().out


def test_the_first_step_of_a_longer_training_learns(tiny):
    """The checkpoint's learning rate is that of the old schedule's end: 0."""
    run = tiny("trainer.max_steps=6")
    before = tensors(run.last)
    resume("run", ["trainer.max_steps=7"], trust=[])
    moved = [float((tensors(run.last)[name] - value).abs().max()) for name, value in before.items() if name.startswith("/state_dict")]
    assert max(moved) > 1e-5
    run.write_job("interrupted")
    with pytest.raises(ConfigError, match="run is at step 7: trainer.max_steps cannot be 3"):
        resume("run", ["trainer.max_steps=3"], trust=[])


@pytest.mark.parametrize("words", [[], ["fresh=true"]])
def test_a_folder_of_the_user_is_left_alone(tiny, words):
    folder = Path("mine")
    (folder / "eval").mkdir(parents=True)
    for name in ("data.json", "notes.yaml", "config.yaml", "eval/keep.txt"):
        (folder / name).write_text("x")
    Path("other/wandb").mkdir(parents=True)
    Path("other/wandb/precious.txt").write_text("x")
    with pytest.raises(RunError, match="other is not a run of lab, and not empty"):
        tiny(*words, run_dir="other")
    assert Path("other/wandb/precious.txt").exists()
    with pytest.raises(RunError, match="mine is not a run of lab, and not empty: choose another run_dir"):
        tiny(*words, run_dir="mine")
    assert sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != ".lock") == [
        "config.yaml",
        "data.json",
        "keep.txt",
        "notes.yaml",
    ]


def test_starting_over_removes_what_the_run_wrote_and_nothing_else(tiny):
    run = tiny("trainer.max_steps=2")
    (run.path / "notes.txt").write_text("mine")
    (run.checkpoints / ".last.ckpt.1.tmp").write_text("half")
    draft = run.path / "exports" / ".export.1.tmp"  # of an export at work, which holds no lock
    draft.mkdir(parents=True)
    tiny("trainer.max_steps=3", "fresh=true")
    assert draft.exists()
    assert (run.path / "notes.txt").read_text() == "mine" and run.job()["step"] == 3
    assert [row["step"] for row in rows("run") if "train/loss" in row] == [1, 2, 3]
    assert len(list(run.path.glob("events.out.tfevents.*"))) == 1 and not list(run.checkpoints.glob(".*"))


def test_resume_changes_nothing_but_hardware_and_length(tiny):
    tiny("trainer.max_steps=2")
    with pytest.raises(ConfigError, match="^trainer.max_stpes cannot change when a run is resumed; did you mean trainer.max_steps\\?$"):
        resume("run", ["trainer.max_stpes=5"], trust=[])
    for word in ("optimizer.lr=1", "model=lot", "experiment=none", "task.seed=3", "seed=1"):
        with pytest.raises(Exception, match=f"^{word.partition('=')[0]} cannot change when a run is resumed.*trainer.max_steps"):
            resume("run", [word], trust=[])


def test_the_one_rule_of_run_dir(tiny, capsys):
    run = tiny("trainer.max_steps=4")
    first = tensors(run.last)
    began = run.job()["started"]
    tiny("trainer.max_steps=4", "trainer.num_workers=1")  # not another experiment
    assert "is finished; nothing to do" in capsys.readouterr().out and run.job()["started"] == began
    with pytest.raises(Exception, match=r"holds another experiment: optimizer.lr: 0.5 here, 0.01 in the run; .*fresh=true"):
        tiny("trainer.max_steps=4", "optimizer.lr=0.5")
    tiny("trainer.max_steps=4", "optimizer.lr=0.5", "fresh=true")
    assert any(not torch.equal(first[name], value) for name, value in tensors(run.last).items() if "state_dict" in name)


def test_one_process_writes_a_run(tiny):
    run = Run("run")
    with run.writer():
        assert run.locked() and Run("run").locked()
        with pytest.raises(RunError, match=r"run: another process writes this run \(process \d+"):
            tiny()
    assert not run.locked()


def test_a_look_at_the_lock_stops_no_writer(tmp_path):
    """`locked`, which lab-report asks, holds the lock for a moment."""
    run = Run(tmp_path / "run")
    run.path.mkdir()
    look = (run.path / ".lock").open("w")
    fcntl.flock(look, fcntl.LOCK_SH)
    threading.Timer(0.2, look.close).start()
    with run.writer():
        assert look.closed and run.locked()


def test_a_run_folder_says_what_it_is(tmp_path):
    with pytest.raises(RunError, match="there is no such run folder"):
        resume(str(tmp_path / "nothing"), [], [])
    with pytest.raises(RunError, match="not a run of lab"):
        resume(str(tmp_path), [], [])


FOREIGN = {
    "other keys": ("config.yaml", "model: {}\nlr: 3", "config.yaml is not that of a run of lab: it lacks task$"),
    "other types": ("config.yaml", "{model: gpt, task: {}, trainer: {}, optimizer: {}}", "its model is a str, not a dict$"),
    "no mapping": ("config.yaml", "- 1", "config.yaml is not that of a run of lab: it holds no keys and values but a list$"),
    "empty": ("config.yaml", "", "it holds no keys and values but a NoneType$"),
    "no yaml": ("config.yaml", "a: [1\nb: 2", "config.yaml is not valid YAML: .*line 2"),
    "no text": ("config.yaml", b"\xff\xfe", "config.yaml is not valid YAML"),
    "other hparams": ("hparams.yaml", "lr: 3", "hparams.yaml is not that of a run of lab: it lacks choices$"),
    "hparams of another type": ("hparams.yaml", "{choices: [1], code_version: a}", "its choices is a list, not a dict$"),
    "other job": ("job.json", "[]", "job.json is not that of a run of lab: it holds no keys and values but a list$"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_another_program_wrote(tmp_path, name):
    file, content, sentence = FOREIGN[name]
    files = {
        "config.yaml": yaml.safe_dump(compose([*TINY, "model=lot"]).stored),
        "hparams.yaml": "{choices: {model: lot, task: copy_reverse}, code_version: a, git_commit: null}",
        "job.json": '{"status": "done", "step": 12}',
    }
    for path, text in (files | {file: content}).items():
        (tmp_path / path).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RunError, match=sentence) as error:
        resume(str(tmp_path), [], [])
    assert "\n" not in str(error.value)


def test_a_mistake_in_a_stored_config_says_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = compose([*TINY, "model=lot"]).stored
    stored["model"]["mixer"]["n_heads"] = 3
    run = Run("run")
    run.path.mkdir()
    (run.path / "config.yaml").write_text(yaml.safe_dump(stored, sort_keys=False))
    (run.path / "hparams.yaml").write_text("{choices: {model: lot, task: copy_reverse}, code_version: a, git_commit: null}")
    with pytest.raises(
        ConfigError, match=r"^model.mixer.n_heads \(run/config.yaml:\d+\): Attention: d_model=16 must be a multiple of n_heads=3"
    ):
        resume("run", [], [])
    with pytest.raises(ConfigError, match=r"^trainer.num_workers \(command line\): expected an int, got 'x'"):
        resume("run", ["trainer.num_workers=x"], [])


def test_a_full_disk_leaves_the_last_checkpoint(killer, command):
    """The limit on the size of a file stands for the disk: the small files fit, a checkpoint does not."""

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    line = [*TINY, "run_dir=run"]
    done = command("lab-train", *line, cwd=killer, preexec_fn=small_disk)
    assert done.returncode == 1 and "File too large" in done.stderr and "run_dir=run goes on" in done.stderr
    said = [line for line in done.stderr.strip().splitlines() if "does not use backend native" not in line]  # without a compiler
    assert len(said) == 1
    assert Run("run").job()["status"] == "failed" and "File too large" in Run("run").job()["reason"]
    assert list((killer / "run" / "checkpoints").iterdir()) == []  # no half of a file
    assert train(compose(line)).job()["status"] == "done"


def test_a_crash_while_writing_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"lab": {}, "x": torch.ones(3)}, path)

    def cut(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", cut)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"lab": {}, "x": torch.zeros(3)}, path)
    assert torch.equal(torch.load(path)["x"], torch.ones(3)) and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("model", "where"),
    [("transformer", r"the tensor model\.|blocks\.0|embedding|head|norm"), ("lot", r"blocks|embedding|head|norm|omega")],
)
def test_a_non_finite_loss_names_the_step_and_the_module(tiny, model, where):
    with pytest.raises(RunError, match=rf"(the loss is|the gradient, not the loss, is) .*at step [2-9].*({where}).*lower optimizer.lr"):
        tiny(f"model={model}", "optimizer.lr=1e30", "trainer.grad_clip=null", "trainer.checkpoint_every=1")
    job = Run("run").job()
    assert job["status"] == "failed" and f"at step {job['step'] + 1}" in job["reason"]
    assert read_checkpoint("run/checkpoints/last.ckpt")["global_step"] == job["step"]  # it can be resumed


def test_a_checkpoint_is_read_without_executing_code(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    identity = {"config": {}, "choices": {}, "config_hash": "0", "code_version": "0", "git_commit": None}
    whole = {"lab": identity, "state_dict": {}, "global_step": 0}
    torch.save({"lab": {}, "x": Evil()}, tmp_path / "evil.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    torch.save({**whole, "lab": [1]}, tmp_path / "entry.ckpt")
    torch.save({**whole, "lab": {**identity, "config": "x"}}, tmp_path / "config.ckpt")
    torch.save({"lab": identity, "state_dict": {}}, tmp_path / "step.ckpt")
    for key in identity:
        torch.save({**whole, "lab": {name: value for name, value in identity.items() if name != key}}, tmp_path / f"no_{key}.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Evil()))
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    written = (tmp_path / "evil.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(written[: len(written) // 2])
    for name, sentence in {
        "evil": "holds more than tensors and plain values",
        "pickle": "not a checkpoint, or only the beginning of one",
        "cut": "not a checkpoint, or only the beginning of one",
        "foreign": "foreign.ckpt is not a checkpoint of lab: it lacks lab$",
        "list": "not a checkpoint of lab: it holds no keys and values but a list$",
        "entry": "not a checkpoint of lab: its lab is a list, not a dict$",
        "config": "not a checkpoint of lab: its config is a str, not a dict$",
        "step": "not a checkpoint of lab: it lacks global_step$",
        **{f"no_{key}": f"not a checkpoint of lab: it lacks {key}$" for key in identity},
        "missing": "there is no such checkpoint",
    }.items():
        with pytest.raises(RunError, match=sentence):
            read_checkpoint(tmp_path / f"{name}.ckpt")
    assert not (tmp_path / "executed").exists()


def test_a_second_signal_stops_at_once(killer, command):
    """A validation that takes forever stands for whatever the first signal has to wait for."""
    (killer / "slow.py").write_text(
        "import os, signal, time\nimport pytorch_lightning as pl\n"
        "class Slow(pl.Callback):\n"
        "    def on_validation_start(self, trainer, module):\n"
        "        for _ in range(2):\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(600)\n"
    )
    start = time.monotonic()
    done = command("lab-train", *TINY, "run_dir=run", "+callbacks.slow._target_=slow.Slow", cwd=killer)
    assert done.returncode == 130 and time.monotonic() - start < 200
    assert Run("run").job()["status"] == "interrupted" and "stopped at once" in Run("run").job()["reason"]
