"""Copy-reverse, data sets of the user's own, and what every task promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lab.analysis.metrics import TokenScores
from lab.config import ConfigError
from lab.tasks import CopyReverse, Dataset
from lab.tasks.base import IGNORE, random_integers


def small(**changes):
    return CopyReverse(**{"vocab_size": 12, "seq_len": 8, "n_train": 100, "n_val": 50, "n_test": 50, **changes})


@pytest.mark.parametrize("layout", ["reverse", "copy", "copy_reverse"])
def test_layout(layout):
    task = small(layout=layout, seq_len=12)
    batch = task.split("train").batch(range(20))
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        delimiter = inputs.index(2)
        prefix = inputs[:delimiter]
        answer = {"reverse": prefix[::-1], "copy": prefix, "copy_reverse": prefix + prefix[::-1]}[layout]
        assert inputs == (prefix + [2] + answer)[:-1]
        assert targets == [IGNORE] * len(prefix) + answer
        assert len(inputs) == task.seq_len and task.prompt_len == len(prefix) + 1
        assert all(3 <= token < 12 for token in prefix)


def test_a_sample_depends_on_its_index_alone():
    split = small().split("train")
    whole = split.batch(range(100)).inputs
    assert torch.equal(split.batch([7, 3, 99]).inputs, whole[[7, 3, 99]])
    assert torch.equal(small(n_train=10).split("train").batch([7]).inputs, whole[[7]])
    assert not torch.equal(small(seed=1).split("train").batch(range(100)).inputs, whole)


def test_splits_and_lengths_are_different_streams():
    task = small(vocab_size=1000, seq_len=32)
    rows = [tuple(row) for name in ("train", "val", "test") for row in task.split(name).prefixes(np.arange(50)).tolist()]
    assert len(set(rows)) == len(rows)
    double = task.split("test", scale=2)
    assert double.batch([0]).inputs.shape == (1, 64)
    assert double.prefixes(np.arange(1))[0, :16].tolist() != task.split("test").prefixes(np.arange(1))[0].tolist()


def test_duplicates_across_splits_are_counted():
    assert "in validation: 50 of 50, in test: 50 of 50" in small(vocab_size=5, seq_len=2).describe()
    assert "in validation: 0 of 50, in test: 0 of 50" in small(vocab_size=1000, seq_len=32).describe()


def test_random_integers_are_uniform_and_independent():
    draws = random_integers(0, "train", np.arange(20000), 8, 3, 13)
    counts = np.stack([(draws == symbol).mean(0) for symbol in range(3, 13)])
    assert draws.min() == 3 and draws.max() == 12
    np.testing.assert_allclose(counts, 0.1, atol=4 * math.sqrt(0.09 / 20000))  # every symbol at every position
    pairs = np.corrcoef(draws.T) - np.eye(8)
    assert np.abs(pairs).max() < 5 / math.sqrt(20000)  # positions of a row
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 5 / math.sqrt(20000)  # neighbouring rows


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seq_len": 7}, "task.seq_len must be a positive multiple of 2"),
        ({"seq_len": 8, "layout": "copy_reverse"}, "multiple of 3 with layout copy_reverse"),
        ({"vocab_size": 3}, "task.vocab_size must be at least 4"),
        ({"eval_lengths": [0]}, "task.eval_lengths"),
    ],
)
def test_impossible_values_say_what_would_be_right(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(**change)


def test_an_oracle_scores_one_and_uniform_logits_score_ln_v():
    task = small()
    batch = task.split("val").batch(range(50))
    oracle = 50 * torch.nn.functional.one_hot(batch.targets.clamp(min=0), task.vocab_size).float()
    scores = TokenScores(task.seq_len)
    scores.update(oracle, batch.targets)
    result = scores.compute()
    assert result["exact_match"] == 1 and result["token_accuracy"] == 1
    assert result["by_position"].isnan().tolist() == [True] * 4 + [False] * 4
    scores.reset()
    scores.update(torch.zeros_like(oracle), batch.targets)
    assert float(scores.compute()["ce_loss"]) == pytest.approx(math.log(task.vocab_size), abs=1e-6)


def test_exact_match_wants_every_scored_token_and_no_other():
    targets = torch.tensor([[IGNORE, 1, 2], [IGNORE, 1, 2]])
    predicted = torch.tensor([[0, 1, 2], [0, 1, 1]])
    scores = TokenScores(3)
    scores.update(torch.nn.functional.one_hot(predicted, 3).float(), targets)
    result = scores.compute()
    assert result["exact_match"] == 0.5 and result["token_accuracy"] == 0.75
    assert result["by_position"].tolist()[1:] == [1.0, 0.5]


class Pairs(torch.utils.data.Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_a_users_dataset_is_padded_on_the_right():
    data = Pairs(([5, 6, 7], [6, 7, 8]), (torch.tensor([5]), torch.tensor([IGNORE])), (np.array([1, 2]), np.array([2, 3])))
    batch = Dataset(10, 4, train=data, val=data, pad_token=9).split("train").batch([0, 1, 2])
    assert batch.inputs.tolist() == [[5, 6, 7], [5, 9, 9], [1, 2, 9]]
    assert batch.targets.tolist() == [[6, 7, 8], [IGNORE] * 3, [2, 3, IGNORE]]
    assert batch.lengths.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        (([1, 2], [1]), "equal length"),
        (([], []), "0 tokens"),
        (([1] * 5, [1] * 5), "5 tokens; task.seq_len allows 1 to 4"),
        (([1, 10], [1, 1]), "input_ids from 1 to 10; task.vocab_size allows 0 to 9"),
        (([1, 1], [1, 12]), "target_ids from 1 to 12"),
        ([1, 2, 3], "pair"),
        (("ab", "cd"), "pair"),
    ],
)
def test_a_users_bad_item_is_named(item, sentence):
    good = Pairs(([1], [1]))
    with pytest.raises(ConfigError, match=rf"task\.val\[0\].*{sentence}"):
        Dataset(10, 4, train=good, val=Pairs(item))


def test_a_users_dataset_without_a_test_split_says_so():
    good = Pairs(([1], [1]))
    with pytest.raises(ConfigError, match="task.test is not set"):
        Dataset(10, 4, train=good, val=good).split("test")
    with pytest.raises(ConfigError, match="eval_lengths"):
        Dataset(10, 4, train=good, val=good).split("val", scale=2)
