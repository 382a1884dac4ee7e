"""The LightningModule and what it promises: the loss of a window, optimiser groups, schedules, logs, compile, precision, devices."""

from __future__ import annotations

import json
import logging
import math
import warnings
from functools import partial

import pytest
import torch
from conftest import KILLER, TINY, rows, tensors

from lab.config import ConfigError, compose
from lab.mixers import Lattice
from lab.models import Stack
from lab.training import AdamW, Run, RunError, Settings, train
from lab.training.experiment import prepare
from lab.training.loss_weights import LossWeight, parse_loss_weights
from lab.training.optimizer import parameter_groups

RAGGED = '''
import torch

class Ragged(torch.utils.data.Dataset):
    """Rows of 1 to 6 tokens: micro-batches differ in what they score."""
    def __len__(self):
        return 64
    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        x = torch.randint(0, 9, (2 + i % 6,), generator=g)
        return x[:-1], x[1:]
'''
RAGGED_TASK = (
    *(word for word in TINY if not word.startswith("task.")), "model=transformer", "task=dataset", "task.vocab_size=9", "task.seq_len=6",
    "+task.train._target_=ragged.Ragged", "+task.val._target_=ragged.Ragged", "model.dropout=0.0",
)  # fmt: skip


@pytest.fixture
def ragged(tmp_path, monkeypatch):
    (tmp_path / "ragged.py").write_text(RAGGED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


PARTS = ("embedding", "position", "norm", "head", "block_0")


def weights(run):
    return {name: value for name, value in tensors(run.last).items() if name.startswith("/state_dict")}


def test_accumulation_is_one_batch_in_pieces(ragged):
    """Losses are averaged over the scored and the real tokens of the window, not over micro-batches of unequal size."""
    line = [*RAGGED_TASK, "model=lot", "loss_weights.sync=1.0"]
    whole = train(compose([*line, "trainer.batch_size=16", "run_dir=whole"]))
    pieces = train(compose([*line, "trainer.batch_size=4", "trainer.accumulate=4", "run_dir=pieces"]))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(pieces)[name], value, rtol=1e-4, atol=1e-5)
    for a, b in zip(rows("whole"), rows("pieces"), strict=True):
        for name in ("train/loss", "train/ce_loss", "train/sync", "train/diversity", "train/grad_norm", "val/ce_loss"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-4)


@pytest.mark.parametrize(("model", "killed_at"), [pytest.param("transformer", None, marks=pytest.mark.slow), ("lot", 7)])
def test_two_processes_train_as_one_does(ragged, command, model, killed_at):
    """DDP over gloo: the same global batches, the same curve and weights; interrupted by SIGTERM to the first process and resumed as
    well. With experts, whose balance is no mean over tokens: ranks must take the loss of all their tokens, not the mean of their losses."""
    (ragged / "killer.py").write_text(KILLER)
    line = [*RAGGED_TASK, f"model={model}", "trainer.batch_size=8", "trainer.accumulate=2", "+callbacks.killer._target_=killer.Killer"]
    if model == "lot":
        line[:0] = ["feed_forward=moe", "loss_weights.balance=1.0", "loss_weights.entropy=1.0"]
    line += ["+callbacks.killer.number=15", f"+callbacks.killer.step={killed_at or 10**6}"]
    train(compose([*line[:-1], "+callbacks.killer.step=1000000", "run_dir=one"]))
    two = [*line, "run_dir=two", "trainer.devices=2", "trainer.strategy=ddp"]
    if killed_at is not None:
        done = command("lab-train", *two, cwd=ragged)
        assert done.returncode == 143, done.stderr
        assert Run("two").job()["step"] == killed_at + 1
    done = command("lab-train", *two, cwd=ragged)
    assert done.returncode == 0, done.stderr
    one = rows("one")
    assert len(one) == len(rows("two")) == 14
    for a, b in zip(one, rows("two"), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for name in a:
            if name not in ("train/tokens_per_second", "train/seconds"):
                assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), (a["step"], name)
    for name, value in weights(Run("one")).items():
        torch.testing.assert_close(weights(Run("two"))[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_loss_that_fails_on_one_rank_stops_all_with_its_sentence(ragged, command):
    """Rank 1 meets the bad weights first; the run's own process says where they are."""
    (ragged / "poison.py").write_text(
        "import pytorch_lightning as pl\n"
        "class Poison(pl.Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, index):\n"
        "        if trainer.global_rank == 1 and trainer.global_step == 2:\n"
        "            module.model.head.weight.data.fill_(float('nan'))\n"
    )
    words = [*RAGGED_TASK, "+callbacks.poison._target_=poison.Poison", "trainer.devices=2", "trainer.strategy=ddp", "run_dir=run"]
    done = command("lab-train", *words, cwd=ragged)
    assert done.returncode == 1
    assert "the loss is nan at step 3; the first non-finite value is in the tensor head.weight" in Run("run").job()["reason"]


def test_early_stopping_ends_a_run_that_can_go_on(tiny):
    stop = "+callbacks.stop._target_=pytorch_lightning.callbacks.EarlyStopping"
    run = tiny(stop, "+callbacks.stop.monitor=val/ce_loss", "+callbacks.stop.stopping_threshold=100.0", "trainer.checkpoint_every=1000")
    assert run.job()["status"] == "done" and run.job()["step"] == 6 and "before step 12" in run.job()["reason"]
    assert torch.load(run.last, weights_only=True)["global_step"] == 6
    assert (run.path / "metrics.json").exists()


def test_a_window_without_scored_tokens_is_no_failure(tiny, tmp_path, monkeypatch):
    (tmp_path / "mostly.py").write_text(
        "class Mostly:\n    def __len__(self):\n        return 16\n"
        "    def __getitem__(self, i):\n        return [1, 2], [-100, 3 if i < 2 else -100]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = [word for word in RAGGED_TASK if "ragged" not in word]
    run = train(compose([*words, "+task.train._target_=mostly.Mostly", "+task.val._target_=mostly.Mostly", "run_dir=run"]))
    assert run.job()["status"] == "done" and 0.0 in [row.get("train/ce_loss") for row in rows("run")]


def test_validation_without_scored_tokens_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "none.py").write_text(
        "class Unscored:\n    def __len__(self):\n        return 16\n    def __getitem__(self, i):\n        return [1, 2], [-100, -100]\n"
    )
    words = [word for word in RAGGED_TASK if "ragged" not in word]
    with pytest.raises(RunError, match="val/ce_loss is nan at step 6: has the validation split any scored target"):
        train(compose([*words, "+task.train._target_=none.Unscored", "+task.val._target_=none.Unscored", "run_dir=run"]))


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("trainer.accelerator=gpu", r"^trainer \(command line\): No supported gpu backend"),
        ("trainer.accelerator=gpuu", "trainer.accelerator.*did you mean gpu"),
        ("trainer.strategy=fsdp", "trainer.strategy.*expected auto or ddp"),
        ("trainer.devices=foo", "trainer.devices"),
        ("+callbacks.x._target_=lab.training.Settings +callbacks.x.max_steps=1", "callbacks.x.*Callback"),
        ("+callbacks.x._target_=lab.training.Progres", "did you mean Progress"),
        ("seed=-1", r"^seed \(command line\) must be 0 or more, got -1$"),
        ("task.seed=-1", r"^task.seed \(command line\) must be 0 or more"),
        ("task.n_val=0", r"^task.n_val \(command line\): .*n_val and n_test must be at least 1"),
        ("model.mixer.n_heads=3", r"^model.mixer.n_heads \(command line\): Attention: d_model=16 must be a multiple of n_heads=3"),
        ("model.position=x", "^model.position .*: "),
        ("loss_weights.snc=1", r"^loss_weights.snc \(command line\): the model has no auxiliary loss snc; did you mean sync\?"),
        ("trainer.batch_size=100", r"^trainer.batch_size \(command line\): .*70 samples, one step needs trainer.batch_size 100"),
    ],
)
def test_a_mistake_leaves_the_folder_as_it_was(tiny, word, sentence):
    run = tiny("trainer.max_steps=1")
    before = tensors(run.last)
    with pytest.raises(ConfigError, match=sentence):
        tiny(*word.split(), "fresh=true")
    assert run.job()["status"] == "done" and tensors(run.last).keys() == before.keys()
    with pytest.raises(ConfigError, match=sentence):
        tiny(*word.split(), run_dir="another")
    assert not Run("another").path.exists()


def test_a_run_logs_what_is_promised(tiny):
    run = tiny("model=lot", "trainer.log_layer_grad_norms=true", "trainer.log_every=4")
    train_rows = [row for row in rows("run") if "train/loss" in row]
    val_rows = [row for row in rows("run") if "val/loss" in row]
    assert [row["step"] for row in train_rows] == [4, 8, 12] and [row["step"] for row in val_rows] == [6, 12]
    expected = "loss ce_loss sync diversity exact_match sync_order grad_norm lr tokens_per_second"
    assert train_rows[0].keys() == {"step", *(f"grad_norm/{part}" for part in PARTS), *(f"train/{name}" for name in expected.split())}
    expected = "loss ce_loss token_accuracy exact_match exact_match_free sync diversity mean_sync_order"
    assert val_rows[0].keys() == {"step", "train/tokens", "train/seconds", *(f"val/{name}" for name in expected.split())}
    for row in train_rows:
        assert row["train/loss"] == pytest.approx(row["train/ce_loss"] + 0.02 * row["train/sync"] + 0.01 * row["train/diversity"], rel=1e-5)
        assert row["train/sync_order"] == pytest.approx(1 - row["train/sync"], rel=1e-5)
        assert row["train/grad_norm"] == pytest.approx(math.hypot(*(row[f"grad_norm/{part}"] for part in PARTS)), rel=1e-4)
    assert train_rows[0]["train/lr"] == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * 3 / 12)))  # what step 4 was taken with
    assert len(list(run.path.glob("events.out.tfevents.*"))) == 1
    metrics = json.loads((run.path / "metrics.json").read_text())
    best = min(val_rows, key=lambda row: row["val/ce_loss"])
    assert metrics["split"] == "val" and metrics["checkpoint"] == "best" and metrics["step"] == best["step"]
    assert metrics["metrics"]["ce_loss"] == pytest.approx(best["val/ce_loss"])
    assert (run.path / "checkpoint.pt").resolve() == run.best.resolve()


def test_tensorboard_has_the_same_scalars(tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny("model=lot")
    events = EventAccumulator("run")
    events.Reload()
    logged = [row for row in rows("run") if "train/loss" in row]
    assert [event.step for event in events.Scalars("train/loss")] == [row["step"] for row in logged]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([row["train/loss"] for row in logged])
    assert {"val/exact_match", "train/sync_order", "train/lr"} <= set(events.Tags()["scalars"])


def test_validation_is_of_the_average_where_there_is_one(tiny):
    run = tiny("trainer.ema=0.5", "trainer.val_every=12")
    states = torch.load(run.last, weights_only=True)
    assert any(not torch.equal(value, states["current_model_state"][name]) for name, value in states["state_dict"].items())
    import lab
    from lab.training.evaluate import score

    model, task, _ = lab.load(run.path)
    metrics, _ = score(model, task, "val", 1, 8, 0)
    assert metrics["ce_loss"] == pytest.approx(rows("run")[-1]["val/ce_loss"], rel=1e-6)


# ---------------------------------------------------------------------- losses and optimiser


def test_loss_weights_follow_their_schedules():
    ramp, plateau = LossWeight(2.0, "ramp", 4), LossWeight(2.0, "plateau", 4)
    assert [ramp.at(step, 12) for step in (0, 1, 4, 11)] == [0.0, 0.5, 2.0, 2.0]
    assert [plateau.at(step, 12) for step in (0, 2, 4, 7, 9, 11)] == [0.0, 1.0, 2.0, 2.0, 1.0, 0.0]
    assert LossWeight(2.0).at(0, 12) == 2.0


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        ({"snyc": 1.0}, r"loss_weights.snyc: Stack has no auxiliary loss snyc; did you mean sync\?"),
        (
            {"sync": {"value": 1.0, "schedule": "rump", "ramp_steps": 2}},
            "^loss_weights.sync.schedule: expected off, ramp, plateau, ",
        ),
        ({"sync": {"value": 1.0, "schedule": "ramp"}}, "^loss_weights.sync.ramp_steps: it must be at least 1"),
        ({"sync": {"value": 1.0, "steps": 1}}, "^loss_weights.sync.steps: there is no such key; did you mean ramp_steps?"),
        ({"sync": {"schedule": "off"}}, "^loss_weights.sync: it has no value"),
        ({"sync": "high"}, "^loss_weights.sync: expected a number, got 'high'"),
    ],
)
def test_wrong_loss_weights(node, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse_loss_weights(node, ("sync", "diversity"), "Stack")


def test_a_weight_of_zero_logs_and_does_nothing_else(tiny):
    tiny("model=lot", "loss_weights.sync=0", "loss_weights.diversity=0", run_dir="zero")
    row = rows("zero")[0]
    assert row["train/loss"] == row["train/ce_loss"] and row["train/sync"] > 0 and row["train/diversity"] > 0


def test_a_weight_for_a_loss_that_the_model_lacks(tiny):
    with pytest.raises(ConfigError, match=r"^loss_weights.sync \(command line\): the model has no auxiliary loss sync; it has none"):
        tiny("model=transformer", "loss_weights.sync=0.1")
    assert not Run("run").exists()


def test_what_is_decayed():
    model = Stack(11, 8, 1, partial(Lattice, n_heads=2), max_len=5)
    model.blocks[0].mixer.omega._optim = {"lr": 1e-4}
    model.blocks[0].mixer.kappa._optim = {"lr": 1.0}
    groups = parameter_groups(model, lr=1e-2, weight_decay=0.1)
    of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(of) == len(named)  # each parameter once
    assert of[id(named["blocks.0.mixer.omega"])] == (1e-4, 0.0)
    assert of[id(named["blocks.0.mixer.kappa"])] == (1e-2, 0.0)  # its own lr never exceeds the optimiser's
    decayed = {name for name, p in named.items() if of[id(p)][1] == 0.1}
    assert decayed == {
        name for name in named if name.endswith("weight") and not any(part in name for part in ("norm", "embedding", "position"))
    }


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate(schedule):
    adamw = AdamW(lr=0.1, warmup_steps=10, schedule=schedule, min_lr=0.2)
    optimizer, scheduler = adamw.build(torch.nn.Linear(2, 2), max_steps=110)
    rates = []
    for _ in range(110):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:10] == pytest.approx([0.01 * step for step in range(1, 11)])
    expected = {"cosine": 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.5)), "linear": 0.6, "constant": 1.0}[schedule]
    assert rates[60] == pytest.approx(0.1 * expected) and rates[10] == pytest.approx(0.1)
    assert rates[-1] >= (0.1 if schedule == "constant" else 0.02)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, "trainer needs max_steps or max_epochs"),
        ({"max_steps": 1, "max_epochs": 1}, "only one of max_steps and max_epochs"),
        ({"max_steps": 0}, "trainer.max_steps must be at least 1, got 0"),
        ({"max_steps": 1, "grad_clip": 0.0}, "trainer.grad_clip must be above 0"),
        ({"max_steps": 1, "ema": 1.0}, "trainer.ema must be between 0 and 1"),
        ({"max_steps": 1, "num_workers": -1}, "trainer.num_workers must be 0 or more"),
    ],
)
def test_wrong_settings(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**change)


def test_clipping(tiny):
    tiny(
        "trainer.grad_clip=1e-6",
        "trainer.max_steps=1",
        "optimizer.lr=1.0",
        "optimizer.eps=1.0",
        "optimizer.weight_decay=0",
        run_dir="clipped",
    )
    before = dict(prepare(compose([*TINY, "trainer.max_steps=1"]).config).model.named_parameters())
    after = torch.load("clipped/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    moved = max(float((after[f"model.{name}"] - p).detach().abs().max()) for name, p in before.items())
    assert 0 < moved <= 1.1e-6  # with eps 1 a step is about lr times the gradient
    assert rows("clipped")[0]["train/grad_norm"] > 1e-3  # what is logged is the norm before the clipping


# ---------------------------------------------------------------------- compile, precision, experiments


def test_compile_makes_one_graph_per_block_and_hooks_fire(tiny, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **kw: setattr(self, "_compiled_call_impl", torch.compile(self._call_impl, backend=counter, **kw)),
    )
    fired = torch.zeros(())  # a list that grows would be guarded on, and every call compiled anew
    original = Stack.__init__

    def hook(count):
        count.add_(1)

    def hooked(self, *args, **kwargs):
        original(self, *args, **kwargs)
        for block in self.blocks:
            block.mixer.register_forward_hook(lambda *_: hook(fired))

    monkeypatch.setattr(Stack, "__init__", hooked)
    plain = tiny("trainer.max_steps=4", "task.n_val=8", "model.dropout=0.0", run_dir="plain")
    assert counter.frame_count == 0
    eager_fired = int(fired)
    compiled = tiny("trainer.max_steps=4", "task.n_val=8", "model.dropout=0.0", "trainer.compile=true", run_dir="compiled")
    assert counter.frame_count == 2  # one block: a graph for training, one for validation
    assert eager_fired > 4 and int(fired) == 2 * eager_fired
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(compiled)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("words", [["trainer.activation_checkpointing=true"], ["trainer.num_workers=2"], ["ops.kuramoto_scan=reference"]])
def test_what_must_not_change_the_result(tiny, words):
    expected = weights(tiny("model=lot", "trainer.max_steps=4", run_dir="a"))
    got = weights(tiny("model=lot", "trainer.max_steps=4", *words, run_dir="b"))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions_train(tiny, precision):
    run = tiny("model=lot", f"trainer.precision={precision}", "trainer.max_steps=30", "trainer.val_every=30", "optimizer.lr=3e-2")
    losses = [row["train/ce_loss"] for row in rows("run") if "train/ce_loss" in row]
    assert losses[-1] < 0.95 * losses[0]
    theta = torch.load(run.last, weights_only=True)["state_dict"]["model.blocks.0.mixer.theta0"]
    assert theta.dtype == (torch.float64 if precision == "64-true" else torch.float32)


def test_half_precision_needs_a_gpu(tiny):
    with pytest.raises(ConfigError, match=r"^trainer.precision \(command line\): 16-mixed needs a GPU; bf16-mixed works on the CPU"):
        tiny("trainer.precision=16-mixed")


def test_torchrun_is_refused_in_one_sentence(tiny, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match="run it once, with trainer.devices=N, not under torchrun"):
        tiny()


def test_a_constructors_mistake_in_a_file_names_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("model:\n  mixer: {lattice_shape: [2, 3]}\ntrainer: {max_steps: 1}\n")
    with pytest.raises(ConfigError, match=r"^model.mixer.lattice_shape \(x.yaml:2\): Lattice: lattice_shape=\[2, 3\] must be two sides"):
        train(compose(["--config=x.yaml"]))


def test_the_warnings_and_log_levels_of_the_caller_come_back(tiny):
    logger = logging.getLogger("pytorch_lightning")
    before = logger.level, list(warnings.filters)
    tiny("trainer.max_steps=1")
    assert (logger.level, list(warnings.filters)) == before
