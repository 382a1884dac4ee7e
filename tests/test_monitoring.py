"""Monitoring sees what it should and changes nothing: not the weights, the modes, the random states, nor the run's identity."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, rows, tensors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lab.analysis.plots import delimiter_wave
from lab.analysis.snapshots import read_snapshot, snapshot_steps
from lab.config import ConfigError, compose, first_difference
from lab.mixers import Attention, Lattice
from lab.training import Run, monitoring
from lab.training.monitoring import Phases, stacked

WATCHED = (
    "+callbacks.phases._target_=lab.training.Phases", "+callbacks.phases.interval=4", "+callbacks.phases.samples=3",
    "+callbacks.attention._target_=lab.training.Attention", "+callbacks.attention.interval=5", "+callbacks.attention.maps=true",
)  # fmt: skip


def events(run, kinds=("scalars", "images", "histograms")):
    """{kind: {tag: [steps]}} of the run's TensorBoard events, as its reader gives them after purging."""
    reader = EventAccumulator(str(run.path), size_guidance=dict.fromkeys(kinds, 0)).Reload()
    read = {"scalars": reader.Scalars, "images": reader.Images, "histograms": reader.Histograms}
    return {kind: {tag: [event.step for event in read[kind](tag)] for tag in reader.Tags()[kind]} for kind in kinds}


def test_what_is_seen_and_when(tiny):
    run = tiny(*WATCHED, "model.n_layers=2")
    assert list(snapshot_steps("run", "phases")) == [0, 4, 8, 12] and list(snapshot_steps("run", "attention")) == [0, 5, 10, 12]
    phases = read_snapshot("run", "phases", 4)
    assert {name: value.shape for name, value in phases.items()} == {
        "step": (), "tokens": (3, 8), "lengths": (3,), "prompt_len": (), "theta": (2, 3, 8, 2), "omega": (2, 2), "kappa": (2, 2),
        "r": (2, 3, 8), "layers": (2,),
    }  # fmt: skip
    np.testing.assert_allclose(phases["r"], abs(np.exp(1j * phases["theta"]).mean(-1)), atol=1e-6)
    weights = read_snapshot("run", "attention", 5)["attention"].astype(float)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-2)
    assert not np.triu(weights, 1).any()
    seen = {name: row["step"] for row in rows("run") for name in row}
    names = [
        *(f"watch_attention/entropy_layer_{i}_head_{h}" for i in (0, 1) for h in (0, 1)),
        "watch_phases/sync_order_layer_0",
        "watch_phases/sync_order_layer_1",
    ]
    assert set(names) <= set(seen)
    (first,) = (row for row in rows("run") if row["step"] == 0 and "watch_phases/sync_order_layer_1" in row)
    assert first["watch_phases/sync_order_layer_1"] == pytest.approx(read_snapshot("run", "phases", 0)["r"][1].mean(), abs=1e-6)
    shown = events(run)
    assert shown["scalars"]["watch_phases/sync_order_layer_1"] == [0, 4, 8, 12]
    assert shown["images"] == {"watch_phases/delimiter_wave": [0, 4, 8, 12], "watch_attention/maps": [0, 5, 10, 12]}
    assert set(shown["histograms"]) == {
        f"watch_{n}_layer_{i}" for n in ("phases/theta", "phases/omega", "phases/kappa", "attention/entropy") for i in (0, 1)
    }


def test_the_rows_are_the_first_ones_of_validation(tiny):
    from lab.tasks import CopyReverse

    tiny(*WATCHED, "trainer.max_steps=1", "trainer.val_every=1")
    task = CopyReverse(vocab_size=12, seq_len=8, n_train=70, n_val=12)
    stored = read_snapshot("run", "phases", 0)
    np.testing.assert_array_equal(stored["tokens"], task.split("val").batch(range(3)).inputs)
    assert stored["prompt_len"] == task.prompt_len and stored["tokens"][0, task.prompt_len - 1] == 2  # the delimiter


def test_the_entropy_is_that_of_the_weights(tiny):
    """At the start of training attention is nearly uniform over the t + 1 visible tokens."""
    tiny(*WATCHED, "trainer.max_steps=1", "trainer.val_every=1")
    uniform = sum(math.log(t + 1) for t in range(8)) / 8
    (first,) = (row for row in rows("run") if row["step"] == 0 and "watch_attention/entropy_layer_0_head_0" in row)
    assert uniform - 0.1 < first["watch_attention/entropy_layer_0_head_0"] <= uniform + 1e-6


@pytest.mark.parametrize("more", [(), ("trainer.ema=0.9", "trainer.accumulate=2")])
def test_training_does_not_notice(tiny, more):
    """Dropout is on: a random number drawn, or a mode left behind, would show in the weights."""
    plain = tiny(*more, run_dir="plain")
    watched = tiny(*more, *WATCHED, run_dir="watched")
    expected, got = tensors(plain.last), tensors(watched.last)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert plain.hparams()["config_hash"] == watched.hparams()["config_hash"]
    assert first_difference(plain.config(), watched.config()) is None


def test_random_numbers_and_modes_are_put_back(tiny):
    """A model that draws while it records, one of its modules in eval mode during training."""
    task = SimpleNamespace(split=lambda name: SimpleNamespace(__len__=lambda: 3), prompt_len=None)

    class Split:
        def __len__(self):
            return 3

        def batch(self, indices):
            from lab.tasks import Batch

            np.random.rand()
            return Batch(torch.zeros(len(indices), 4, dtype=torch.long), torch.zeros(len(indices), 4))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.frozen = torch.nn.Dropout(), torch.nn.Dropout()
            self.seen = []

        def forward(self, tokens, state=None, *, lengths=None, source=None, source_lengths=None, want=()):
            self.seen.append((self.training, self.inner.training, torch.is_grad_enabled(), float(torch.rand(()))))
            return SimpleNamespace(record={})

    model = Model()
    model.frozen.eval()
    task.split = lambda name: Split()
    module = SimpleNamespace(task=task, model=model, device="cpu")
    trainer = SimpleNamespace(
        is_global_zero=True, default_root_dir="run", global_step=0, max_steps=9, loggers=[], precision_plugin=SimpleNamespace(
            forward_context=lambda: torch.no_grad())
    )  # fmt: skip
    torch.manual_seed(1), np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[2]
    callback = Phases(interval=1, samples=5)
    trainer.callbacks = [callback]
    callback.on_train_start(trainer, module)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[2] == before[1]
    assert [seen[:3] for seen in model.seen] == [(False, False, False)]
    assert (model.training, model.inner.training, model.frozen.training) == (True, True, False)
    callback.on_train_batch_end(trainer, module, None, None, 0)
    assert len(model.seen) == 1  # it records nothing, and is not asked again


@pytest.mark.parametrize("at", [8, 3])  # after the checkpoint of step 5, and before any
def test_a_broken_run_that_goes_on_has_nothing_twice(tiny, breaker, at):
    words = (*WATCHED, *breaker(at))
    with pytest.raises(RuntimeError, match=f"step {at}"):
        tiny(*words)
    Path("run/phases/step_00000011.npz").touch()  # as if of the steps that are lost
    time.sleep(1)  # TensorBoard reads its files in the order of their names, which have whole seconds
    run = tiny(*words)
    assert list(snapshot_steps(run.path, "phases")) == [0, 4, 8, 12]
    steps = [row["step"] for row in rows(run.path) if "watch_phases/sync_order_layer_0" in row]
    assert steps == [0, 4, 8, 12]
    shown = events(run)
    assert shown["scalars"]["watch_phases/sync_order_layer_0"] == steps and shown["images"]["watch_phases/delimiter_wave"] == steps


def test_a_model_without_phases_is_left_alone(tiny):
    tiny(*WATCHED, "model=transformer")
    assert not snapshot_steps("run", "phases") and list(snapshot_steps("run", "attention")) == [0, 5, 10, 12]
    assert not any("watch_phases/sync_order_layer_0" in row for row in rows("run"))


class OnlyTheta(Lattice):
    """A user's mixer that records a name of ours, and not the rest."""

    def mix(self, x, state, lengths, want):
        out = super().mix(x, state, lengths, want)
        return out._replace(record={name: value for name, value in out.record.items() if name == "theta"})


def test_a_model_that_records_phases_alone_is_left_alone(tiny):
    tiny(*WATCHED, "model.mixer._target_=test_monitoring.OnlyTheta", "trainer.max_steps=1", "trainer.val_every=1")
    assert not snapshot_steps("run", "phases") and not snapshot_steps("run", "attention")


def test_layers_of_unequal_shape():
    """A layer with fewer heads has NaN in the place of those that it lacks; plots show the heads that there are."""
    theta = stacked([torch.ones(1, 4, 3), torch.ones(1, 4, 2)])
    assert theta.shape == (2, 1, 4, 3) and theta.dtype == np.float32
    assert np.isnan(theta[1, ..., 2]).all() and not np.isnan(theta[0]).any() and not np.isnan(theta[1, ..., :2]).any()
    snapshot = {"theta": theta, "r": np.ones((2, 1, 4)), "lengths": np.array([4]), "prompt_len": np.int64(0), "step": np.int64(1)}
    assert [delimiter_wave(snapshot, layer).axes[0].images[0].get_array().shape for layer in (0, 1)] == [(3, 4), (2, 4)]
    (velocity,) = (axes for axes in delimiter_wave(snapshot, 1).axes if axes.get_ylabel().startswith("velocity"))
    assert not np.isnan(velocity.lines[2].get_ydata()).any()


def test_one_pass_for_all_that_look_at_the_same_rows(tiny, monkeypatch):
    seen = []
    ask = monitoring.record_of
    monkeypatch.setattr(monitoring, "record_of", lambda trainer, *a: seen.append(trainer.global_step) or ask(trainer, *a))
    words = (*WATCHED, "callbacks.attention.interval=4", "~logger")
    tiny(*words, "+callbacks.attention.samples=3")
    assert seen == [0, 0, 4, 8, 12]  # the first of them shows what there is to see
    assert list(snapshot_steps("run", "phases")) == list(snapshot_steps("run", "attention")) == [0, 4, 8, 12]
    seen.clear()
    tiny(*words, "+callbacks.attention.samples=2", run_dir="other")
    assert seen == [0, 0, 0, 0, 4, 4, 8, 8, 12, 12]


@pytest.mark.parametrize(
    ("room", "shape", "sentence"),
    [
        (3 * 8 * 8, (3, 8), None),
        (2 * 8 * 8, (2, 8), "monitoring looks at 2 of 3 rows, 8 of their 8 tokens"),
        (5 * 5 + 1, (1, 5), "monitoring looks at 1 of 3 rows, 5 of their 8 tokens"),
    ],
)
def test_attention_of_long_inputs_does_not_fill_the_memory(tiny, monkeypatch, capsys, room, shape, sentence):
    """room: of one head in one layer, in weights. Fewer rows, then fewer tokens; what is seen of them is the same."""
    tiny(*WATCHED, "model.n_layers=2", "trainer.max_steps=1", "trainer.val_every=1", "+callbacks.attention.samples=3", run_dir="whole")
    assert "monitoring looks" not in capsys.readouterr().out
    monkeypatch.setattr(monitoring, "LIMIT", room * 4 * 2 * 2)
    monkeypatch.setattr(monitoring, "PROBE", 4)
    tiny(*WATCHED, "model.n_layers=2", "trainer.max_steps=1", "trainer.val_every=1", "+callbacks.attention.samples=3")
    said = [line for line in capsys.readouterr().out.splitlines() if "monitoring looks" in line]
    assert len(said) == bool(sentence) and (sentence or "") in "".join(said)
    whole, part = (read_snapshot(run, "phases", 0) for run in ("whole", "run"))
    assert part["tokens"].shape == shape
    B, n = shape
    np.testing.assert_array_equal(part["lengths"], [n] * B)
    np.testing.assert_allclose(part["theta"], whole["theta"][:, :B, :n], atol=1e-5)
    assert read_snapshot("run", "attention", 0)["attention"].shape == (2, 2, n, n)


@pytest.mark.slow
def test_two_processes_look_once(tmp_path, command):
    words = [*TINY, *WATCHED, "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=4", "run_dir=run"]
    done = command("lab-train", *words)
    assert done.returncode == 0, done.stderr
    assert list(snapshot_steps(tmp_path / "run", "phases")) == [0, 4]
    assert [row["step"] for row in rows(tmp_path / "run") if "watch_phases/sync_order_layer_0" in row] == [0, 4]


def test_it_can_be_switched_off_and_is_cleared(tiny):
    run = tiny(*WATCHED, "trainer.max_steps=4")
    assert (run.path / "phases").exists()
    tiny(*WATCHED, "callbacks.phases.interval=null", "callbacks.attention.interval=null", "trainer.max_steps=4", "fresh=true")
    assert not (run.path / "phases").exists() and not (run.path / "attention").exists()


@pytest.mark.parametrize(("word", "sentence"), [("interval=0", "interval must be at least 1, or null"), ("samples=0", "samples must be")])
def test_a_wrong_setting_is_one_sentence(tiny, word, sentence):
    with pytest.raises(ConfigError, match=f"{sentence}"):
        tiny(*WATCHED, f"callbacks.phases.{word}")
    assert not Run("run").exists()


def test_it_is_on_by_default():
    callbacks = compose(["experiment=copy_reverse_small"]).config["callbacks"]
    assert {"phases", "attention"} <= set(callbacks)


@pytest.mark.parametrize("mixer", [Attention(8, 2), Lattice(8, 2), Lattice(8, 2, phase_mode="gain"), Lattice(8, 2, phase_mode="literal")])
def test_recorded_weights_make_the_output(mixer):
    """attention times v, through o, is what the fused path gave; with a state as well."""
    torch.manual_seed(0)
    x = torch.randn(3, 7, 8)
    with torch.no_grad():
        for state, chunk in ((None, x), (mixer(x[:, :4], want=("state",)).state, x[:, 4:])):
            out = mixer(chunk, state, want=("record",))
            values = mixer.v(x).unflatten(-1, (2, 4))
            y = torch.einsum("bhls,bshd->blhd", out.record["attention"], values[:, : out.record["attention"].shape[-1]]).flatten(2)
            torch.testing.assert_close(mixer.o(y), out.y, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out.y, mixer(chunk, state))
