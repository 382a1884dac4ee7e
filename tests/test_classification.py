"""Classifiers: a pooled head over real tokens, trained, scored and exported as any other model; and digits."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lab.analysis.metrics import TokenScores
from lab.cli import eval as lab_eval
from lab.config import ConfigError, compose
from lab.export import export_run
from lab.mixers import S4DLayer
from lab.models import Stack
from lab.tasks import Digits
from lab.training import train
from lab.training.experiment import prepare

LISTOPS = (
    "task=listops", "task.seq_len=16", "task.min_len=4", "task.max_depth=3", "task.max_args=3", "task.n_train=64", "task.n_val=16",
    "task.n_test=16", "model.d_model=16", "model.n_layers=1", "model.dropout=0.0", "trainer.max_steps=4", "trainer.batch_size=8",
    "trainer.val_every=2", "trainer.checkpoint_every=2", "trainer.log_every=1", "trainer.accelerator=cpu",
)  # fmt: skip


def classifier(pool: str, bidirectional: bool = False, **more) -> Stack:
    torch.manual_seed(0)

    def mixer(d_model):
        return S4DLayer(d_model, d_state=8, bidirectional=bidirectional)

    return Stack(12, 16, 2, mixer, d_ff=0, position="none", n_classes=5, pool=pool, **more).eval()


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("bidirectional", [False, True])
@torch.no_grad()
def test_padding_changes_nothing(pool, bidirectional):
    model = classifier(pool, bidirectional)
    tokens, lengths = torch.randint(0, 12, (3, 9)), torch.tensor([9, 4, 1])
    together = model(tokens, lengths=lengths)
    assert together.shape == (3, 5)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(together[row], model(tokens[row : row + 1, :n])[0], rtol=1e-4, atol=1e-5)
    tokens[1, 4:] = 0
    torch.testing.assert_close(model(tokens, lengths=lengths), together, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_two_poolings_and_several_answers():
    tokens = torch.randint(0, 12, (2, 6))
    mean, last = classifier("mean"), classifier("last")
    last.load_state_dict(mean.state_dict())
    features = Stack(12, 16, 2, lambda d_model: S4DLayer(d_model, d_state=8), d_ff=0, position="none").eval()
    features.load_state_dict({k: v for k, v in mean.state_dict().items() if "head" not in k}, strict=False)
    features.head = torch.nn.Identity()
    x = features(tokens)
    torch.testing.assert_close(mean(tokens), F.linear(x.mean(1), mean.head.weight, mean.head.bias))
    torch.testing.assert_close(last(tokens), F.linear(x[:, -1], last.head.weight, last.head.bias))
    assert classifier("last", n_answers=3)(tokens).shape == (2, 3, 5)


def test_a_classifier_has_no_state():
    model, tokens = classifier("mean"), torch.zeros(1, 3, dtype=torch.long)
    for call in (model.init_state, model.prefill):
        with pytest.raises(NotImplementedError, match="answers once for a whole input"):
            call(1 if call == model.init_state else tokens)
    with pytest.raises(NotImplementedError):
        model.generate(tokens, 2)
    with pytest.raises(ValueError, match="pool='max'; expected mean or last"):
        classifier("max")


def test_scores_of_classes():
    scores = TokenScores(7, ("accuracy",), n_classes=3)
    scores.update(torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 2]))
    scores.update(torch.eye(3)[[0]], torch.tensor([1]))
    result = scores.compute()
    assert result["accuracy"] == pytest.approx(0.6)
    assert result["confusion"].tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


@pytest.mark.parametrize("model", ["transformer", "mamba", "laminar"])
def test_a_classifier_trains_and_is_scored(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = train(compose([*LISTOPS, f"model={model}", "run_dir=run", "~callbacks"]))
    logged = run.metrics
    assert set(logged["metrics"]) == {"loss", "ce_loss", "accuracy"} and logged["by_position"] == []
    assert sum(map(sum, logged["confusion"])) == 16 and set(logged["published"]) == {"S4", "S5", "Transformer"}
    assert lab_eval.main(["run"]) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "best constant (no model)" in shown and "S5 (published)" in shown and "arXiv:2208.04933" in shown


@pytest.mark.slow
@pytest.mark.parametrize("model", ["transformer", "s4d"])
def test_a_classifier_is_watched_and_exported(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(compose([*LISTOPS, f"model={model}", "run_dir=run", "~callbacks.progress"]))  # with the pictures of attention and of state spaces
    manifest, _ = export_run("run", "onnx")
    (graph,) = manifest["graphs"]
    assert graph["outputs"][0]["shape"] == ["batch", 10]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model.n_classes=4"], "model.n_classes.*ListOps has 10 classes, and the model has 4; it must be 10"),
        (["model.n_classes=null"], "ListOps has 10 classes, and the model predicts tokens"),
        (["model.n_answers=2"], "model.n_answers.*has 1 answers, and the model 2; it must be 1"),
        (["task=parity", "model.n_classes=2"], "model.n_classes.*Parity predicts tokens.*pooled head of 2 classes; it must be null"),
    ],
)
def test_a_wrong_pairing_is_one_sentence(words, sentence):
    composed = compose(["task=listops", "model=s4d_tiny", "trainer.max_steps=1", *words])
    with composed.saying_where(), pytest.raises(ConfigError, match=sentence):
        prepare(composed.config)


def test_a_model_without_a_pooled_head_says_so():
    with pytest.raises(ConfigError, match="TransformerModel has no pooled head: it takes no n_classes"):
        prepare(compose(["task=listops", "model=transformer_seq2seq", "trainer.max_steps=1"]).config)


def test_a_bidirectional_model_may_classify():
    prepare(compose(["task=listops", "model=s4d_tiny", "trainer.max_steps=1", "model.mixer.bidirectional=true"]).config)


@pytest.mark.parametrize("model", ["gated_mlp", "h3", "laminar", "lot", "mamba", "mamba_attention", "s4", "s5", "serriform", "transformer"])
def test_every_model_honours_lengths_under_a_pooled_head(model):
    words = [*LISTOPS[:8], *LISTOPS[11:13], f"model={model}", "model.d_model=32", "model.n_layers=2"]
    built = prepare(compose(words).config).model.eval()
    tokens = torch.randint(1, 16, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = built(tokens, lengths=torch.tensor([16, 5]))
        assert together.shape == (2, 10)
        torch.testing.assert_close(together[1], built(tokens[1:, :5])[0], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------- digits


@pytest.fixture
def images(monkeypatch):
    """The shapes of scikit-learn's images, in their place."""
    rng = np.random.default_rng(0)
    pixels, digits = rng.integers(0, 17, (1797, 64)).astype(float), rng.integers(0, 10, 1797)
    datasets = ModuleType("sklearn.datasets")
    datasets.load_digits = lambda return_X_y: (pixels, digits)  # noqa: N803
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", datasets)
    return pixels.astype(int), digits


def test_digits_are_in_one_split_each(images):
    task = Digits()
    splits = {name: task.split(name) for name in ("train", "val", "test")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 1297, "val": 250, "test": 250}
    assert sorted(np.concatenate([split.order for split in splits.values()]).tolist()) == list(range(1797))
    batch = splits["val"].batch([3, 1])
    row = splits["val"].order[3]
    assert batch.inputs[0].tolist() == images[0][row].tolist() and batch.targets[0] == images[1][row]
    assert "train 1,297, val 250, test 250; of these also in validation: 0 of 250" in task.describe()
    assert task.references("test")["best constant"] < 0.3 and len(task.facts()["sha256"]) == 64
    with pytest.raises(ConfigError, match="task.eval_lengths"):
        task.split("val", scale=2)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        Digits().split("train")
