"""An encoder-decoder from the command line: batches with a source, training, evaluation, generation, its attention maps."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import TINY, rows
from export_checks import OF_SOURCE, at_once  # noqa: F401 (a fixture)

import lab
from lab.analysis import plot_attention
from lab.analysis.metrics import run as run_model
from lab.analysis.snapshots import read_snapshot
from lab.cli.eval import main as lab_eval
from lab.cli.export import main as lab_export
from lab.cli.generate import main as lab_generate
from lab.config import ConfigError, compose
from lab.tasks import CopyReverse
from lab.tasks.base import IGNORE
from lab.training import train
from lab.training.experiment import prepare

WORDS = [
    "model=transformer_seq2seq", "task.source=true", "model.n_heads=2", "model.n_layers=2", "callbacks.attention.interval=6",
    "callbacks.attention.maps=true", *(word for word in TINY if "mixer" not in word and "n_layers" not in word and "attention" not in word),
]  # fmt: skip


@pytest.mark.parametrize("layout", ["reverse", "copy", "copy_reverse"])
def test_the_source_is_the_prompt_and_the_answer_stands_alone(layout):
    sizes = {"vocab_size": 12, "seq_len": 12, "layout": layout, "n_train": 20}
    whole = CopyReverse(**sizes).split("train").batch(range(20))
    task = CopyReverse(**sizes, source=True)
    batch = task.split("train").batch(range(20))
    prompt = CopyReverse(**sizes).prompt_len
    assert torch.equal(batch.source, whole.inputs[:, :prompt]) and torch.equal(batch.targets, whole.targets[:, prompt - 1 :])
    assert (batch.inputs[:, 0] == task.start_token).all() and torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert (batch.targets != IGNORE).all() and task.prompt_len == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("seq2seq"))
        return train(compose([*WORDS, "run_dir=run"])).path.resolve()


def test_it_trains_and_is_scored(trained, capsys):
    validated = [row for row in rows(trained) if "val/ce_loss" in row]
    assert len(validated) == 2 and {"val/exact_match", "val/exact_match_free"} <= set(validated[0])
    assert lab_eval([str(trained), "trainer.accelerator=cpu", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["metrics"]["exact_match_free"] <= scores["metrics"]["exact_match"] + 1e-9
    assert len(scores["by_position"]) == 4 and None not in scores["by_position"]  # the answer of seq_len 8
    model, task, _ = lab.load(trained)
    batch = task.split("test").batch(range(4))
    assert torch.equal(run_model(model, batch, want=("losses",)).y, model(batch.source, batch.inputs))


def test_generate_takes_the_prompt_as_the_source(trained, capsys):
    model, _, _ = lab.load(trained)
    source = torch.tensor([[5, 6, 7, 2]])
    for words, beams in (((), 1), (("--beams", "3", "--length-penalty", "1"), 3)):
        assert lab_generate([str(trained), "--prompt", "5 6 7 2", "--max-new-tokens", "4", *words]) == 0
        want = model.generate(torch.ones(1, 1, dtype=torch.long), 4, source=source, beams=beams, length_penalty=float(beams > 1))
        assert capsys.readouterr().out.split() == [str(token) for token in want[0, 1:].tolist()]
    assert lab_generate([str(trained), "--prompt", "5 6 7 2", "--prompt", "3 2", "--max-new-tokens", "3"]) == 0
    assert "--- 2: 3 2" in capsys.readouterr().out
    wrong = {"--beams 0": "at least 1", "--beams 2 --temperature 1": "choose one", "--length-penalty 1": "needs --beams"}
    for words, sentence in wrong.items():
        assert lab_generate([str(trained), "--prompt", "5 2", *words.split()]) == 2
        assert sentence in capsys.readouterr().err


def test_export_writes_and_names_all_four_graphs(trained, at_once, capsys):
    assert lab_export([str(trained), "--format", "torchscript"]) == 0
    said = capsys.readouterr().out
    for graph in OF_SOURCE:
        assert re.search(rf"the {graph} graph, (largest difference \d|compared by what)", said), said
    assert len(list((trained / "exports").glob("best.*ts.pt"))) == 4


def test_the_maps_of_all_three_attentions(trained):
    logged = {name for row in rows(trained) for name in row if name.startswith("watch_")}
    kinds = ("attention", "cross_attention", "encoder_attention")
    assert logged == {f"watch_{kind}/entropy_layer_{i}_head_{h}" for kind in kinds for i in (0, 1) for h in (0, 1)}
    snapshot = read_snapshot(trained, "attention")
    assert [snapshot[kind].shape for kind in kinds] == [(2, 2, 4, 4), (2, 2, 4, 5), (2, 2, 5, 5)] and len(snapshot["source"]) == 5
    for kind in kinds:
        assert abs(snapshot[kind].astype(float).sum(-1) - 1).max() < 0.01
        axes = plot_attention(trained, kind=kind).axes[0]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 0", "layer 1"]
    assert "token of the source s, 0 to 4" in plot_attention(trained, kind="cross_attention").axes[0].get_xlabel()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=transformer_seq2seq"], "the model is an encoder-decoder, and the task gives it no source; task.source=true does"),
        (["model=transformer", "task.source=true"], "task.source.*the model is a decoder that takes none; model=transformer_seq2seq does"),
    ],
)
def test_a_model_and_a_task_that_do_not_fit(words, sentence):
    composed = compose([*words, "trainer.max_steps=1"])
    with pytest.raises(ConfigError, match=sentence), composed.saying_where():
        prepare(composed.config)
