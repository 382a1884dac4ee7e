"""Truncated backpropagation over contiguous streams: what is read, what is carried, what is kept, and what cannot be carried."""

from __future__ import annotations

import pytest
import torch
from conftest import rows, tensors
from torch.utils import _pytree as pytree

from lab.config import ConfigError, compose
from lab.tasks import StandardLibrary, TrainLoader
from lab.training import Run, resume, train
from lab.training.experiment import prepare


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Files of 3,000 bytes or so; what a run trains on is a permutation of the bytes, so that each place can be told."""
    monkeypatch.setenv("LAB_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    for i in range(30):
        path = tmp_path / f"source/module_{i:02}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"x_{i}_{k} = {i * k % 17}\n" for k in range(9)))
    return tmp_path


def corpus(**changes):
    return StandardLibrary(**{"seq_len": 16, "source": "source", "carry_state": True, **changes})


def loader(**changes):
    settings = {"split": corpus().split("train"), "batch_size": 4, "accumulate": 2, "max_steps": 40, "seed": 1, "streams": True}
    return TrainLoader(**{**settings, **changes})


def windows(**changes):
    """(steps, accumulate, batch_size, L) of inputs and targets"""
    steps = list(loader(**changes))
    return [torch.stack([torch.stack([getattr(micro, name) for micro in step]) for step in steps]) for name in ("inputs", "targets")]


# ----------------------------------------------------------------------- streams


def test_each_row_continues_itself(source):
    n = len(corpus().bytes_of("train"))
    epoch = n // 8 // 16
    inputs, targets = windows(max_steps=epoch + 3)
    assert torch.equal(inputs[1:epoch, ..., 0], targets[: epoch - 1, ..., -1]) and torch.equal(inputs[..., 1:], targets[..., :-1])
    streams = targets[:epoch].permute(1, 2, 0, 3).reshape(8, -1).tolist()
    text = corpus().bytes_of("train").tobytes()
    places = sorted(text.index(bytes(stream)) for stream in streams)
    assert all(b - a >= epoch * 16 for a, b in zip(places, places[1:], strict=False)), "no byte twice"
    assert not torch.equal(inputs[epoch], inputs[0]), "another epoch, another order"


def test_a_step_reads_what_seed_and_step_say(source):
    whole = windows()[0]
    assert torch.equal(windows()[0], whole) and not torch.equal(windows(seed=2)[0], whole)
    later = loader(num_workers=1)
    later.load_state_dict({"step": 37})
    assert torch.equal(torch.stack([torch.stack([micro.inputs for micro in step]) for step in later]), whole[37:])
    halves = [windows(rank=rank, world=2)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves, 2), whole)
    with pytest.raises(ValueError, match="the training split has .* cut into streams, one step needs trainer.batch_size 4000"):
        loader(batch_size=4000)


# ----------------------------------------------------------------------- a run

WORDS = (
    "task=stdlib", "task.source=source", "task.seq_len=16", "task.carry_state=true", "task.val_bytes=64", "model.d_model=16",
    "model.n_layers=1", "trainer.max_steps=9", "trainer.batch_size=4", "trainer.accumulate=2", "trainer.val_every=6",
    "trainer.checkpoint_every=4", "trainer.log_every=1", "trainer.accelerator=cpu", "optimizer.lr=1e-2", "~callbacks.progress", "~logger",
    "~callbacks.phases", "~callbacks.attention", "~callbacks.state_spaces", "~callbacks.experts",
)  # fmt: skip
MODELS = {
    "mamba": ["model=mamba_tiny"],
    "s4": ["model=s4_tiny", "model.dropout=0.1"],
    "s5": ["model=s5_tiny", "model.dropout=0.0"],
    "h3": ["model=h3_tiny", "model.dropout=0.0"],
    "serriform": ["model=serriform", "model.dropout=0.1"],
    "laminar": ["model=laminar", "model.n_heads=2", "model.dropout=0.0"],
}


def same_files(a: Run, b: Run) -> None:
    expected, got = tensors(a.last), tensors(b.last)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


@pytest.mark.parametrize("name", ["mamba", "laminar", pytest.param("serriform", marks=pytest.mark.slow)])
def test_a_run_that_broke_goes_on_bit_by_bit(source, breaker, name):
    words = [*WORDS, *MODELS[name], "trainer.ema=0.9"]
    whole = train(compose([*words, *breaker(10**6), "run_dir=whole"]))
    line = [*words, *breaker(7), "run_dir=run"]
    with pytest.raises(RuntimeError, match="broken at step 7"):
        train(compose(line))
    run = train(compose(line))
    assert any("carried_states" in name for name in tensors(run.last))
    same_files(whole, run)


@pytest.mark.parametrize("name", [name if name in ("mamba", "laminar") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def test_what_is_carried_is_the_state_after_all_of_the_stream(source, name):
    """Without learning, so that the weights stay: then the state in the checkpoint is that of one long prefill."""
    composed = compose([*WORDS, *MODELS[name], "model.dropout=0.0", "optimizer.lr=1e-30", "optimizer.weight_decay=0", "run_dir=run"])
    run = train(composed)
    carried = torch.load(run.last, weights_only=True)["carried_states"]
    model, (inputs, targets) = prepare(composed.config).model.eval(), windows(max_steps=9, seed=42)
    losses = torch.zeros(9)
    for micro in (0, 1):
        stream, following = (tokens[:, micro].transpose(0, 1).reshape(4, -1) for tokens in (inputs, targets))
        with torch.no_grad():
            wanted = model.prefill(stream, model.init_state(4))[1]
            long = torch.nn.functional.cross_entropy(model(stream).flatten(0, 1), following.flatten(), reduction="none")
        losses += long.unflatten(0, (4, 9, 16)).mean((0, 2)) / 2
        got = pytree.tree_leaves(carried[micro])
        assert len(got) == len(pytree.tree_leaves(wanted))
        for ours, theirs in zip(got, pytree.tree_leaves(wanted), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    logged = [row["train/ce_loss"] for row in rows("run") if "train/ce_loss" in row]
    assert logged == pytest.approx(losses.tolist(), rel=1e-4), "each step predicts from all that its stream has had before"


def test_an_epoch_begins_without_a_state(source):
    """At the first step of an epoch a run with carried states does what it would do from the start."""
    epoch = len(corpus().bytes_of("train")) // 8 // 16
    run = train(compose([*WORDS, *MODELS["mamba"], f"trainer.max_steps={epoch + 1}", "optimizer.lr=1e-30", "run_dir=run"]))
    (state, _) = torch.load(run.last, weights_only=True)["carried_states"]
    assert state["position"].tolist() == [16] * 4


def test_a_longer_training_continues_the_streams(source):
    words = [*WORDS, *MODELS["mamba"], "optimizer.schedule=constant"]
    whole, run = train(compose([*words, "run_dir=whole"])), train(compose([*words, "trainer.max_steps=5", "run_dir=run"]))
    resume("run", ["trainer.max_steps=9"], [])
    drop = ("train/tokens_per_second", "train/seconds")
    late = [[{k: v for k, v in row.items() if k not in drop} for row in rows(name) if row["step"] > 6] for name in ("whole", "run")]
    assert late[0] == late[1] and tensors(whole.last)["/carried_states/0/position"].tolist() == [144] * 4 and run.job()["step"] == 9


@pytest.mark.slow
def test_two_processes_carry_as_one(source, command):
    """With two devices, then with one: each process goes on with its share of the rows."""
    words = [*WORDS, *MODELS["mamba"], "optimizer.schedule=constant", "model.mixer.n_layers=1"]
    one = train(compose([*words, "run_dir=one"]))
    done = command("lab-train", *words, "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=5", "run_dir=two", cwd=source)
    assert done.returncode == 0, done.stderr
    resume("two", ["trainer.devices=1", "trainer.strategy=auto", "trainer.max_steps=9"], [])
    expected, got = tensors(one.last), tensors("two/checkpoints/last.ckpt")
    for name in expected:
        if "carried_states" in name:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=transformer"], "^task.carry_state .*: a stream has no longest length, and the model was built with max_len 16; "),
        (["model=transformer", "model.position=none"], "the model's state grows with every token; "),
        (["model=h3_attention", "model.n_layers=3", "model.mixer.attention.n_heads=2"], "grows with every token"),
        (["model=s4_tiny", "model.mixer.bidirectional=true"], "the model reads the future, .* it must be false"),
    ],
)
def test_what_cannot_be_carried_is_one_sentence(source, words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        train(compose([*WORDS, *words]))
