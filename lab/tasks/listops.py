"""ListOps: nested lists of digits under MIN, MAX, MED(ian) and SM (sum modulo 10); which digit is the value of the whole?

    [MAX 2 9 [MIN 4 7 ] 0 ]          value 9; a digit, an operator with its bracket, and "]" are one token each

The published grammar (arXiv:2011.04006, section 2.2.1, after arXiv:1804.06028): a node is an operator with probability 1/4, each as likely,
with 2 .. max_args arguments, each number as likely; else a digit; at depth max_depth always a digit. The median of an even number of digits
is rounded down. Kept are expressions of more than min_len tokens and fewer than max_len. Rows are padded on the right to seq_len; `lengths`
says how many tokens are real. Tokens: 0 padding, 1 .. 10 the digits 0 .. 9, 11 .. 14 the operators, 15 "]".

Sample i is the first expression of fitting length in a stream of its own. All candidates of a batch grow together, level by level.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from lab.config import ConfigError
from lab.tasks.base import Batch, random_integers
from lab.tasks.synthetic import Draw, Synthetic, SyntheticSplit

OPERATORS = ("MIN", "MAX", "MED", "SM")
DIGIT, OPEN, CLOSE = 1, 11, 15  # token of 0, of the first operator, of "]"
ONE_IN = 4  # nodes, one is an operator
AT_ONCE = 16  # candidates of a sample that grow together
TRIES = 1 << 16  # candidates of a sample
NODES = 1 << 13  # of a candidate: numbers that its random draws have


class Level(NamedTuple):
    """The nodes of one depth, those of a candidate side by side, in the order of their parents."""

    owner: np.ndarray  # (n,) candidate
    parent: np.ndarray  # (n,) node of the level above
    digit: np.ndarray  # (n,)
    operator: np.ndarray  # (n,) -1: it is the digit


class ListOps(Synthetic):
    next_token = False
    metrics = ("accuracy",)

    def __init__(
        self,
        vocab_size: int = 16,
        seq_len: int = 2000,
        n_classes: int = 10,
        min_len: int = 500,
        max_depth: int = 10,
        max_args: int = 10,
        n_train: int = 96000,
        n_val: int = 2000,
        n_test: int = 2000,
        seed: int = 0,
        reference: Mapping[str, Any] | None = None,
    ) -> None:
        if vocab_size != CLOSE + 1:
            raise ValueError(f"task.vocab_size must be {CLOSE + 1} (padding, digits, operators, a bracket), got {vocab_size}")
        if n_classes != 10:
            raise ValueError(f"task.n_classes must be 10, the digits, got {n_classes}")
        if max_args < 2 or max_depth < 2:
            raise ValueError(f"task.max_args and max_depth must be at least 2, got {max_args} and {max_depth}")
        if not 0 <= min_len <= seq_len - 5 or seq_len > NODES:
            raise ValueError(f"task.min_len must be at least 0 and 5 below task.seq_len, that at most {NODES}; got {min_len} and {seq_len}")
        super().__init__(vocab_size, seq_len, n_train, n_val, n_test, seed, (1,), reference)
        self.n_classes, self.min_len, self.max_depth, self.max_args = n_classes, min_len, max_depth, max_args

    def split(self, name: str, scale: int = 1) -> SyntheticSplit:
        if scale != 1:
            raise ConfigError("task=listops has the lengths of its grammar: leave task.eval_lengths at [1], and change min_len and seq_len")
        return super().split(name)

    def rows(self, draw: Draw, seq_len: int) -> Batch:
        B = len(draw)
        inputs, values, lengths = np.zeros((B, seq_len), np.int64), np.zeros(B, np.int64), np.zeros(B, np.int64)
        missing, tried = np.arange(B), 0
        while len(missing):
            if tried >= TRIES:
                raise ConfigError(
                    f"task.min_len {self.min_len}: no expression so long in {TRIES:,} tries; max_depth or max_args can change that"
                )
            names = (draw.indices[missing, None] * TRIES + tried + np.arange(AT_ONCE)).ravel()
            levels, size = self.grow(draw, names)
            fits = ((size > self.min_len) & (size < seq_len)).reshape(-1, AT_ONCE)
            found = fits.any(1)
            chosen = (np.arange(len(missing)) * AT_ONCE + fits.argmax(1))[found]
            row = np.full(len(names), -1)  # of the batch, of each candidate that is taken
            row[chosen] = missing[found]
            values[missing[found]], lengths[missing[found]] = write(levels, row, inputs)[missing[found]], size[chosen]
            missing, tried = missing[~found], tried + AT_ONCE
        return Batch(torch.from_numpy(inputs), torch.from_numpy(values), torch.from_numpy(lengths))

    def grow(self, draw: Draw, names: np.ndarray) -> tuple[list[Level], np.ndarray]:
        """The levels of candidates, and their tokens; one that becomes too long is cut, and counts as seq_len."""
        n = len(names)
        owner, parent, number = np.arange(n), np.zeros(n, np.int64), np.zeros(n, np.int64)
        levels, size, nodes = [], np.zeros(n, np.int64), np.zeros(n, np.int64)
        for depth in range(1, self.max_depth + 1):
            key = names[owner] * NODES + number
            kind, digit, operator, n_args = random_integers(draw.seed, draw.stream, key, 4, 0, 2**62).T
            inner = (kind % ONE_IN == 0) & (depth < self.max_depth)
            n_args = np.where(inner, 2 + n_args % (self.max_args - 1), 0)
            size += np.bincount(owner, 1 + inner, n).astype(np.int64)
            nodes += np.bincount(owner, minlength=n)
            cut = size + np.bincount(owner, n_args, n).astype(np.int64) >= self.seq_len
            size[cut] = self.seq_len
            n_args[cut[owner]] = 0
            levels.append(Level(owner, parent, digit % 10, np.where(inner, operator % len(OPERATORS), -1)))
            if not n_args.any():
                break
            parent = np.repeat(np.arange(len(owner)), n_args)
            owner = owner[parent]  # still ascending
            number = nodes[owner] + np.arange(len(owner)) - np.searchsorted(owner, owner)
        return levels, size


def write(levels: list[Level], row: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Writes the tokens of the candidates with a row (row (n,), -1: none) into inputs (B, L); the value of each row (B,)."""
    kept: list[Level] = []
    new = np.zeros(0, np.int64)  # the number of each node of the level above among those that are kept
    for level in levels:
        keep = row[level.owner] >= 0
        parent = new[level.parent[keep]] if len(kept) else level.parent[keep]
        kept.append(Level(row[level.owner[keep]], parent, level.digit[keep], level.operator[keep]))
        new = keep.cumsum() - 1

    value, size = np.zeros(0, np.int64), np.zeros(0, np.int64)
    sizes: list[np.ndarray] = []  # tokens of each node with what is below it, from the deepest level up
    below: Level | None = None
    for level in reversed(kept):
        values, length = level.digit.copy(), np.ones(len(level.owner), np.int64)
        inner = np.flatnonzero(level.operator >= 0)
        if below is not None and len(inner):
            length[inner] = 2 + np.bincount(below.parent, size, len(length)).astype(np.int64)[inner]
            values[inner] = evaluate(level.operator[inner], value, below.parent, np.searchsorted(below.parent, inner))
        value, size, below = values, length, level
        sizes.append(length)

    place = np.zeros(len(value), np.int64)
    for level, size, above in zip(kept, reversed(sizes), [None, *kept], strict=False):
        if above is not None:
            before = size.cumsum() - size
            place = place[level.parent] + 1 + before - before[np.searchsorted(level.parent, level.parent)]
        is_operator = level.operator >= 0
        inputs[level.owner, place] = np.where(is_operator, OPEN + level.operator, DIGIT + level.digit)
        inputs[level.owner[is_operator], (place + size - 1)[is_operator]] = CLOSE
    of_row = np.zeros(len(inputs), np.int64)
    of_row[kept[0].owner] = value
    return of_row


def evaluate(operator: np.ndarray, arguments: np.ndarray, parent: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The values of operators (n,) whose arguments begin at `first` (n,) among those of a whole level, with their parents."""
    n_args = np.diff([*first, len(arguments)])
    ordered = arguments[np.lexsort((arguments, parent))]
    median = (ordered[first + (n_args - 1) // 2] + ordered[first + n_args // 2]) // 2
    results = (np.minimum.reduceat(arguments, first), np.maximum.reduceat(arguments, first), median, np.add.reduceat(arguments, first) % 10)
    return np.choose(operator, results)
