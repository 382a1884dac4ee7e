"""What generated tasks share: sizes, splits, a score without a model, and the count of samples that two splits have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lab.tasks.base import (
    IGNORE,
    SPLITS,
    Batch,
    Indices,
    Split,
    Task,
    check_reference,
    distinct_integers,
    random_integers,
    random_uniform,
)

COUNTED = 2_000_000  # training tokens that are searched for the samples of validation and test
FITTED = 2048  # training rows that the best constant answers are taken from


class Synthetic(Task):
    """The base of generated tasks. A subclass writes `rows`. Inputs of scale * seq_len come from streams of their own."""

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        n_train: int,
        n_val: int,
        n_test: int,
        seed: int,
        eval_lengths: Sequence[int],
        reference: Mapping[str, Any] | None,
    ) -> None:
        if any(scale < 1 for scale in eval_lengths):
            raise ValueError(f"task.eval_lengths must be multiples of seq_len from 1 on, got {list(eval_lengths)}")
        if min(n_train, n_val, n_test) < 1:
            raise ValueError(f"task.n_train, n_val and n_test must be at least 1, got {n_train}, {n_val} and {n_test}")
        if seed < 0:
            raise ValueError(f"task.seed must be 0 or more, got {seed}")
        self.vocab_size, self.seq_len, self.seed = vocab_size, seq_len, seed
        self.sizes = dict(zip(SPLITS, (n_train, n_val, n_test), strict=True))
        self.eval_lengths, self.reference = tuple(eval_lengths), check_reference(reference)

    @abstractmethod
    def rows(self, draw: Draw, seq_len: int) -> Batch:
        """The samples of the indices of `draw`, inputs of length seq_len; vectorised, each a function of its own draws alone."""

    def split(self, name: str, scale: int = 1) -> SyntheticSplit:
        return SyntheticSplit(self, name, self.seq_len * scale)

    def references(self, split: str) -> dict[str, float]:
        return constant_answers(self.split("train"), self.split(split))

    def describe(self) -> str:
        return f"{super().describe()}, {self.vocab_size} tokens; {duplicates(self)}"


class SyntheticSplit(Split):
    def __init__(self, task: Synthetic, name: str, seq_len: int) -> None:
        self.task, self.name, self.seq_len = task, name, seq_len

    def __len__(self) -> int:
        return self.task.sizes[self.name]

    def batch(self, indices: Indices) -> Batch:
        draw = Draw(self.task.seed, f"{self.name}/{self.seq_len}", np.asarray(indices, dtype=np.int64))
        return self.task.rows(draw, self.seq_len)


class Draw:
    """Random numbers for a batch of samples: row i is a pure function of (seed, stream, index i, what)."""

    def __init__(self, seed: int, stream: str, indices: np.ndarray) -> None:
        self.seed, self.stream, self.indices = seed, stream, indices

    def __len__(self) -> int:
        return len(self.indices)

    def integers(self, what: str, n: int, low: int, high: int) -> np.ndarray:
        """(B, n) in [low, high)"""
        return random_integers(self.seed, f"{self.stream}/{what}", self.indices, n, low, high)

    def uniform(self, what: str, n: int) -> np.ndarray:
        """(B, n) in (0, 1)"""
        return random_uniform(self.seed, f"{self.stream}/{what}", self.indices, n)

    def distinct(self, what: str, n: int, low: int, high: int) -> np.ndarray:
        """(B, n) in [low, high), no number twice in a row"""
        return distinct_integers(self.seed, f"{self.stream}/{what}", self.indices, n, low, high)

    def places(self, what: str, n: int, size: int) -> np.ndarray:
        """(B, n) of 0 .. size - 1, ascending, each choice equally likely; costs as much as drawing `size` numbers."""
        return np.sort(np.argpartition(self.uniform(what, size), min(n, size - 1), axis=1)[:, :n], axis=1)


def duplicates(task: Task) -> str:
    """How many samples of validation and test training has as well; of a large training split only a part is searched, and said so."""
    train = task.split("train")
    n = min(len(train), max(COUNTED // task.seq_len, 1))
    seen = {row for indices in _chunks(n) for row in _rows(train, indices)}
    shared = []
    for name in ("val", "test"):
        split = task.split(name)
        m = min(len(split), n)
        count = sum(row in seen for indices in _chunks(m) for row in _rows(split, indices))
        shared.append(f"in {'validation' if name == 'val' else name}: {count} of {m:,}")
    searched = "of these" if n == len(train) else f"of the first {n:,}"
    return f"{searched} also {', '.join(shared)}"


def constant_answers(train: Split, scored: Split) -> dict[str, float]:
    """The scores of the two best answers that do not look at the input: the same one everywhere, and the same one at each position.

    Both are the most frequent ones in the first training rows; the scores are of tokens, or of classes.
    """
    places, targets = _answers(train, range(min(len(train), FITTED)))
    values, counts = np.unique(targets, return_counts=True)
    everywhere = values[counts.argmax()]
    pairs, counts = np.unique(np.stack([places, targets]), axis=1, return_counts=True)
    order = np.argsort(counts, kind="stable")  # the most frequent last, which is the one that stays
    at = dict(zip(pairs[0, order].tolist(), pairs[1, order].tolist(), strict=True))
    right, total = np.zeros(2), 0
    for indices in _chunks(len(scored)):
        places, targets = _answers(scored, indices)
        right += (targets == everywhere).sum(), sum(at.get(p) == t for p, t in zip(places.tolist(), targets.tolist(), strict=True))
        total += len(targets)
    one, several = (right / total).tolist()
    return {"best constant": one} if len(set(at)) == 1 else {"best constant": one, "best constant of each position": several}


def _answers(split: Split, indices: range) -> tuple[np.ndarray, np.ndarray]:
    """The scored targets of rows, and where they stand."""
    batch = split.batch(indices)
    targets = batch.targets.numpy().reshape(len(indices), -1)
    places = np.broadcast_to(np.arange(targets.shape[1]), targets.shape)
    scored = targets != IGNORE
    return places[scored], targets[scored]


def _rows(split: Split, indices: range) -> list[bytes]:
    batch = split.batch(indices)
    targets = batch.targets.numpy().reshape(len(indices), -1)
    read = [batch.inputs.numpy()] if batch.source is None else [batch.source.numpy(), batch.inputs.numpy()]
    return [row.tobytes() for row in np.concatenate([*read, targets], axis=1)]


def _chunks(n: int) -> list[range]:
    return [range(i, min(i + 256, n)) for i in range(0, n, 256)]
