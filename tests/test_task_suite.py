"""What every generated task promises, and what the scores make of it: one list of tasks, each test over all of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lab.analysis.metrics import TokenScores, by_value
from lab.cli import eval as lab_eval
from lab.config import ConfigError, compose, config_hash
from lab.tasks import (
    MQAR,
    Batch,
    Compression,
    CopyReverse,
    Digits,
    FuzzyRecall,
    InContextRecall,
    InductionHeads,
    ListOps,
    Memorization,
    Parity,
    SelectiveCopy,
    Sorting,
    TrainLoader,
)
from lab.tasks.base import IGNORE, distinct_integers
from lab.tasks.synthetic import duplicates
from lab.training import train
from lab.training.experiment import build_node

CONFIGS = Path(__file__).parents[1] / "configs" / "task"
SIZES = {"n_train": 300, "n_val": 40, "n_test": 40}


def induction(inputs, t):
    return inputs[inputs.index(0) + 1]


def mqar(inputs, t):
    return inputs[inputs.index(inputs[t]) + 1]


def recall(inputs, t):
    return next(inputs[i + 1] for i in range(0, t - 1, 2) if inputs[i] == inputs[t])


def selective(inputs, t):
    asks = [i for i, token in enumerate(inputs) if token == inputs[-1]]
    return [token for token in inputs[: asks[0]] if token][t - asks[0]]


def fuzzy(inputs, t):
    """Keys are 0 .. 4, values 5 .. 9: the key before the last run of value tokens, and its value the time before."""
    start = t + 1
    while inputs[start - 1] >= 5:
        start -= 1
    first = start
    while first > 0 and inputs[first - 1] < 5:
        first -= 1
    key, done = inputs[first:start], inputs[start : t + 1]
    for i in range(first):
        if inputs[i : i + len(key)] == key and (i == 0 or inputs[i - 1] >= 5) and 5 <= inputs[i + len(key)] < 10:
            assert inputs[i + len(key) : i + len(key) + len(done)] == done
            return inputs[i + len(key) + len(done)]
    raise AssertionError("the key was not there before")


def memorized(inputs, t):
    return MEMORIZATION.values[inputs[t - 1]]


def listops(inputs, t=None):
    def value(tokens):
        token = tokens.pop(0)
        if token < 11:
            return token - 1
        arguments = []
        while tokens[0] != 15:
            arguments.append(value(tokens))
        tokens.pop(0)
        return {11: min, 12: max, 13: lambda v: int(np.median(v)), 14: lambda v: sum(v) % 10}[token](arguments)

    tokens = [token for token in inputs if token]
    assert inputs == tokens + [0] * (len(inputs) - len(tokens)) and 8 < len(tokens) < 40
    result = value(tokens)
    assert not tokens
    return result


MEMORIZATION = Memorization(33, 8, **SIZES)
TASKS = {  # a task, and what reads the answer at a scored place off the inputs
    "induction": (InductionHeads(10, 12, **SIZES), induction),
    "mqar": (MQAR(64, 16, 4, **SIZES), mqar),
    "mqar_mixed": (MQAR(64, 32, [2, 5], power=1.0, **SIZES), mqar),
    "recall": (InContextRecall(16, 24, **SIZES), recall),
    "recall_noise": (InContextRecall(24, 24, noise=0.4, n_noise=8, **SIZES), recall),
    "recall_single": (InContextRecall(10, 20, multi_query=False, **SIZES), recall),
    "selective_copy": (SelectiveCopy(12, 20, 4, **SIZES), selective),
    "fuzzy_recall": (FuzzyRecall(11, 36, 3, 2, **SIZES), fuzzy),
    "memorization": (MEMORIZATION, memorized),
    "compression": (Compression(8, 12, 8, 12, **SIZES), lambda inputs, t: inputs[t]),
    "parity": (Parity(seq_len=20, **SIZES), lambda inputs, t: sum(inputs[: t + 1]) % 2),
    "parity_last": (Parity(seq_len=20, running=False, **SIZES), lambda inputs, t: sum(inputs) % 2),
    "sorting": (Sorting(20, 16, **SIZES), lambda inputs, t: sorted(inputs[: inputs.index(0)])[t - inputs.index(0)]),
    "copy": (CopyReverse(20, 16, "copy", **SIZES), lambda inputs, t: inputs[t - inputs.index(2)]),
    "listops": (ListOps(seq_len=40, min_len=8, max_depth=4, max_args=4, **SIZES), listops),
}
every_task = pytest.mark.parametrize("name", TASKS)


def predictions(batch: Batch, n: int) -> torch.Tensor:
    """Logits of an oracle."""
    return 50 * torch.nn.functional.one_hot(batch.targets.clamp(min=0), n).float()


@every_task
@pytest.mark.parametrize("scale", [1, 4])
def test_the_answers_can_be_read_off_the_inputs(name, scale):
    task, solve = TASKS[name]
    if task.n_classes is not None and scale > 1:
        with pytest.raises(ConfigError, match="task.eval_lengths"):
            task.split("val", scale)
        return
    batch = task.split("val", scale).batch(range(40))
    assert batch.inputs.shape == (40, task.seq_len * scale) and batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert 0 <= batch.inputs.min() and batch.inputs.max() < task.vocab_size
    if batch.targets.ndim == 1:
        assert [solve(row) for row in batch.inputs.tolist()] == batch.targets.tolist()
        assert batch.lengths is None or batch.lengths.tolist() == (batch.inputs > 0).sum(1).tolist()
        return
    scored = (batch.targets != IGNORE).nonzero().tolist()
    assert {row for row, _ in scored} == set(range(40))
    for row, t in scored:
        assert solve(batch.inputs[row].tolist(), t) == batch.targets[row, t]
        for values in (batch.by or {}).values():
            assert 0 < values[row, t] <= t
    assert set(batch.by or {}) == set(task.by)


@every_task
def test_a_sample_is_a_function_of_its_index(name):
    task, _ = TASKS[name]
    whole = task.split("train").batch(range(300))
    some = task.split("train").batch([7, 3, 299])
    assert torch.equal(some.inputs, whole.inputs[[7, 3, 299]]) and torch.equal(some.targets, whole.targets[[7, 3, 299]])
    for i in range(20):
        alone = task.split("train").batch([i])
        assert torch.equal(alone.inputs[0], whole.inputs[i]) and torch.equal(alone.targets[0], whole.targets[i]), "the rows beside it"
    streams = [task.split("train").batch([5]), task.split("val").batch([5]), task.split("test").batch([5])]
    assert len({tuple(batch.inputs[0].tolist()) for batch in streams}) == 3


def test_sorting_from_a_source():
    task = Sorting(20, 16, **SIZES, source=True)
    batch, whole = task.split("val").batch(range(9)), TASKS["sorting"][0].split("val").batch(range(9))
    assert torch.equal(batch.source, whole.inputs[:, :9]) and torch.equal(batch.targets, whole.inputs[:, :8].sort(1).values)
    assert (batch.inputs[:, 0] == task.start_token).all() and torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert task.prompt_len == 1 and task.describe() == TASKS["sorting"][0].describe(), "the source tells two samples apart"


@every_task
def test_an_oracle_scores_one_and_uniform_logits_ln_v(name):
    task, _ = TASKS[name]
    n = task.n_classes or task.vocab_size
    batch = task.split("test").batch(range(40))
    scores = TokenScores(task.seq_len, task.metrics, task.by, task.n_classes if task.n_answers == 1 else None)
    scores.update(predictions(batch, n), batch.targets, batch.by)
    result = scores.compute()
    assert all(result[metric] == 1 for metric in task.metrics)
    assert ("confusion" in result) == (batch.targets.ndim == 1)
    for group in task.by:
        correct, scored = result[f"by_{group}"]
        assert torch.equal(correct, scored) and scored.sum() == (batch.targets != IGNORE).sum()
    scores.reset()
    scores.update(torch.zeros(*batch.targets.shape, n), batch.targets, batch.by)
    assert float(scores.compute()["ce_loss"]) == pytest.approx(math.log(n), abs=1e-6)


@every_task
def test_the_loader_goes_on_where_it_was(name):
    task, _ = TASKS[name]

    def windows(start):
        loader = TrainLoader(task.split("train"), 4, 1, 5, seed=1)
        loader.load_state_dict({"step": start})
        return [(batch.inputs.tolist(), batch.targets.tolist()) for window in loader for batch in window]

    assert windows(2) == windows(0)[2:]


@every_task
def test_constant_answers_are_what_they_say(name):
    task, _ = TASKS[name]
    references = task.references("test")
    assert "in validation: " in task.describe() and "in test: " in task.describe()
    train, test = (task.split(split).batch(range(n)).targets for split, n in (("train", 300), ("test", 40)))
    best = train[train != IGNORE].mode().values
    counts = torch.bincount(train[train != IGNORE].flatten())
    if (counts == counts.max()).sum() == 1:
        assert references["best constant"] == pytest.approx(float((test[test != IGNORE] == best).double().mean()))
    assert all(0 <= value < 0.9 for value in references.values())


def test_samples_of_two_splits_are_counted():
    assert duplicates(InductionHeads(3, 3, **SIZES)) == "of these also in validation: 40 of 40, in test: 40 of 40"
    assert duplicates(InductionHeads(60, 60, **SIZES)) == "of these also in validation: 0 of 40, in test: 0 of 40"
    assert "of the first 2,000 also" in duplicates(InductionHeads(60, 1000, n_train=10000, n_val=1, n_test=1))


def test_distinct_integers_are_distinct_and_uniform():
    draws = distinct_integers(0, "keys", np.arange(20000), 3, 5, 9)
    assert all(len(set(row)) == 3 for row in draws.tolist()) and draws.min() == 5 and draws.max() == 8
    orders, counts = np.unique(draws, axis=0, return_counts=True)
    assert len(orders) == 24  # of four numbers, three in their order
    np.testing.assert_allclose(counts / 20000, 1 / 24, atol=5 * math.sqrt(1 / 24 / 20000))


def test_queries_of_mqar_come_soon():
    gaps = {power: MQAR(64, 64, 1, power=power, **SIZES).split("train").batch(range(300)) for power in (0.01, 1.0)}
    means = {power: batch.by["distance"][batch.targets != IGNORE].double().mean() for power, batch in gaps.items()}
    i = np.arange(31)
    for power, mean in means.items():
        weights = (i + 1.0) ** (power - 1)
        assert mean == pytest.approx(2 + 2 * (i * weights).sum() / weights.sum(), rel=0.15)


def test_accuracy_by_value():
    assert by_value([0, 1, 1, 0, 2], [0, 1, 2, 0, 2], ranges=False) == {"1": 1.0, "2": 0.5, "4": 1.0}
    assert by_value([0, 1, 1, 0, 2], [0, 1, 2, 2, 2], ranges=True) == {"1": 1.0, "2-3": 0.25, "4-7": 1.0}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: InductionHeads(2), "task.vocab_size must be at least 3"),
        (lambda: InductionHeads(seq_len=2), "task.seq_len must be at least 3"),
        (lambda: MQAR(seq_len=12), "task.seq_len must be even and at least 16"),
        (lambda: MQAR(8), "task.vocab_size must be at least 10"),
        (lambda: MQAR(n_pairs=0), "task.n_pairs"),
        (lambda: InContextRecall(noise=0.5), "task.n_noise"),
        (lambda: InContextRecall(16, 24, n_noise=13), "two keys and two values beside 13 other"),
        (lambda: SelectiveCopy(seq_len=31), "task.seq_len must be at least 32"),
        (lambda: FuzzyRecall(9, max_key=5), "task.max_key must be between 1 and 4"),
        (lambda: Memorization(4), "task.vocab_size must be at least 5"),
        (lambda: Compression(n_answers=31), "task.n_classes and n_answers"),
        (lambda: Parity(3), "task.vocab_size must be 2"),
        (lambda: Sorting(seq_len=5), "multiple of 2"),
        (lambda: ListOps(max_args=1), "task.max_args"),
        (lambda: ListOps(min_len=1996), "task.min_len"),
        (lambda: Digits(n_classes=9), "task.n_classes must be 10"),
        (lambda: SelectiveCopy(reference={"S4": 0.183}), "task.reference: S4 must be"),
    ],
)
def test_impossible_values_say_what_would_be_right(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


GENERATED = sorted(path.stem for path in CONFIGS.glob("*.yaml") if "splits are streams" in path.read_text())


@pytest.mark.parametrize("file", GENERATED)
def test_a_config_is_what_its_data_is(file):
    node = compose([f"task={file}"]).config["task"]
    task = build_node("task", node, None)
    batch = task.split("train").batch(range(4))
    assert batch.inputs.shape[1] == node["seq_len"] and batch.inputs.max() < node["vocab_size"]
    assert all("arXiv:" in entry["source"] for entry in task.reference.values())
    if batch.lengths is not None:
        assert node["min_len"] < int(batch.lengths.min()) and int(batch.lengths.max()) < node["seq_len"]


def test_accuracy_by_distance_and_pairs_is_written_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ("vocab_size=64", "seq_len=16", "n_pairs=[2,4]", "n_train=64", "n_val=16", "n_test=16", "eval_lengths=[1,2]")
    words = ["task=mqar", *(f"task.{word}" for word in small), "model=s4d_tiny", "model.d_model=16", "model.n_layers=1", "~callbacks"]
    sizes = ("trainer.max_steps=2", "trainer.batch_size=8", "trainer.val_every=2", "trainer.accelerator=cpu", "run_dir=run")
    run = train(compose([*words, *sizes]))
    assert set(run.metrics["by_pairs"]) == {"2", "4"}
    assert lab_eval.main(["run"]) == 0
    shown = capsys.readouterr().out
    assert set(run.metrics["by_distance"]) <= {"2-3", "4-7", "8-15"} and "length 32" in shown
    assert "accuracy by pairs: 2: " in shown and "accuracy by distance: " in shown
    assert "attention (published)" in shown and "published: attention, arXiv:2312.04927" in shown
    changed = compose([*words, *sizes, "task.reference.attention.value=0.5"]).stored
    assert config_hash(changed) == config_hash(run.config())  # what others have published is not of the experiment


def test_a_wrong_reference_names_its_key():
    node = {"_target_": "lab.tasks.SelectiveCopy", "reference": {"S4": {"value": "high", "source": "x"}}}
    with pytest.raises(ConfigError, match="task.reference"):
        build_node("task", node, None)
