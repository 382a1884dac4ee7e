"""The loaders: what step t sees is a function of (seed, t), whatever the workers, ranks and resumes."""

from __future__ import annotations

import pytest
import torch

from lab.tasks import CopyReverse, EvalLoader, TrainLoader

TASK = CopyReverse(vocab_size=50, seq_len=8, n_train=22, n_val=11)


def loader(**changes):
    return TrainLoader(**{"split": TASK.split("train"), "batch_size": 4, "accumulate": 2, "max_steps": 7, "seed": 1, **changes})


def tokens(windows):
    return [[batch.inputs.tolist() for batch in window] for window in windows]


def test_an_epoch_sees_no_sample_twice_and_the_next_is_in_another_order():
    windows = tokens(loader(max_steps=4))  # two windows of 8 rows each make an epoch; 6 rows are dropped
    epochs = [sum((rows for window in windows[2 * e : 2 * e + 2] for rows in window), []) for e in (0, 1)]
    for rows in epochs:
        assert len({tuple(row) for row in rows}) == 16
    assert epochs[0] != epochs[1]
    assert tokens(loader(seed=2)) != tokens(loader())


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_where_its_state_was_taken(stop, num_workers):
    whole = tokens(loader())
    first = loader(num_workers=num_workers)
    iterator = iter(first)
    for _ in range(stop):
        next(iterator)
    second = loader()
    second.load_state_dict(first.state_dict())
    assert tokens(second) == whole[stop:]


def test_ranks_share_the_global_batch():
    both = [tokens(loader(rank=rank, world=2)) for rank in (0, 1)]
    joined = [[a + b for a, b in zip(*windows, strict=True)] for windows in zip(*both, strict=True)]
    assert joined == tokens(loader())


def test_iterating_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    list(loader())
    list(loader(num_workers=1))
    list(EvalLoader(TASK.split("val"), 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_impossible_sizes_say_what_would_be_right():
    with pytest.raises(ValueError, match="3 devices do not divide"):
        loader(world=3)
    with pytest.raises(ValueError, match="22 samples, one step needs trainer.batch_size 32"):
        loader(batch_size=32)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_sample_once(world):
    rows = [row for rank in range(world) for batch in EvalLoader(TASK.split("val"), 4, rank, world) for row in batch.inputs.tolist()]
    assert sorted(rows) == sorted(TASK.split("val").batch(range(11)).inputs.tolist())
