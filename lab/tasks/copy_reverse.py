"""Copy-reverse: read a random prefix, then, after a delimiter, write it backwards.

    layout reverse        p_0 p_1 .. p_h-1  |  p_h-1 .. p_1 p_0                    seq_len = 2 h
    layout copy           p_0 p_1 .. p_h-1  |  p_0 p_1 .. p_h-1                    seq_len = 2 h
    layout copy_reverse   p_0 p_1 .. p_h-1  |  p_0 p_1 .. p_h-1 p_h-1 .. p_1 p_0   seq_len = 3 h

An example, vocab_size 10, seq_len 6 ("|" is token 2; "." is a target that is not scored):

    inputs    5 9 3 | 3 9
    targets   . . . 3 9 5

With `source` the prefix and the delimiter are the source of an encoder-decoder, and the answer stands alone behind the start token 1:

    source    5 9 3 |
    inputs    1 3 9
    targets   3 9 5

Only what follows the delimiter is scored: the prefix is random and cannot be predicted. Tokens: 0 padding, 1 the start token, 2 the
delimiter, 3 .. vocab_size - 1 the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from lab.tasks.base import IGNORE, SPLITS, Batch, Indices, Split, Task, random_integers, with_source
from lab.tasks.synthetic import constant_answers

START, DELIMITER, FIRST = 1, 2, 3


class CopyReverse(Task):
    def __init__(
        self,
        vocab_size: int = 1000,
        seq_len: int = 128,
        layout: Literal["reverse", "copy", "copy_reverse"] = "reverse",
        n_train: int = 50000,
        n_val: int = 2000,
        n_test: int = 2000,
        seed: int = 0,
        free_samples: int = 256,
        eval_lengths: Sequence[int] = (1,),
        source: bool = False,
    ) -> None:
        parts = 3 if layout == "copy_reverse" else 2
        if vocab_size <= FIRST:
            raise ValueError(
                f"task.vocab_size must be at least {FIRST + 1} (padding, the start token, the delimiter, a symbol), got {vocab_size}"
            )
        if seq_len < parts or seq_len % parts:
            raise ValueError(f"task.seq_len must be a positive multiple of {parts} with layout {layout}, got {seq_len}")
        if any(scale < 1 for scale in eval_lengths):
            raise ValueError(f"task.eval_lengths must be multiples of seq_len from 1 on, got {list(eval_lengths)}")
        if min(n_train, n_val, n_test) < 1:
            raise ValueError(f"task.n_train, n_val and n_test must be at least 1, got {n_train}, {n_val} and {n_test}")
        if seed < 0:
            raise ValueError(f"task.seed must be 0 or more, got {seed}")
        self.vocab_size, self.seq_len, self.layout, self.seed = vocab_size, seq_len, layout, seed
        self.sizes = dict(zip(SPLITS, (n_train, n_val, n_test), strict=True))
        self.prefix_len = seq_len // parts
        self.prompt_len, self.start_token = (1, START) if source else (self.prefix_len + 1, None)
        self.free_samples, self.eval_lengths = free_samples, tuple(eval_lengths)

    def split(self, name: str, scale: int = 1) -> CopyReverseSplit:
        return CopyReverseSplit(self, name, self.prefix_len * scale)

    def references(self, split: str) -> dict[str, float]:
        return constant_answers(self.split("train"), self.split(split))

    def describe(self) -> str:
        """Counts the prefixes of validation and test that training has as well: at tiny sizes there are only so many."""
        seen = {row.tobytes() for row in self.split("train").prefixes(np.arange(self.sizes["train"]))}
        rows = {name: self.split(name).prefixes(np.arange(self.sizes[name])) for name in ("val", "test")}
        shared = {name: sum(row.tobytes() in seen for row in prefixes) for name, prefixes in rows.items()}
        return (
            f"copy-reverse: {self.sizes['train']:,} training sequences of length {self.seq_len}, {self.vocab_size - FIRST} symbols; "
            f"of these also in validation: {shared['val']} of {self.sizes['val']:,}, in test: {shared['test']} of {self.sizes['test']:,}"
        )


class CopyReverseSplit(Split):
    def __init__(self, task: CopyReverse, name: str, prefix_len: int) -> None:
        self.task, self.name, self.prefix_len = task, name, prefix_len

    def __len__(self) -> int:
        return self.task.sizes[self.name]

    def prefixes(self, indices: np.ndarray) -> np.ndarray:
        """(B,) indices -> (B, h) symbols. Each split, at each length, is a random stream of its own."""
        stream = f"{self.name}/{self.prefix_len}"
        return random_integers(self.task.seed, stream, indices, self.prefix_len, FIRST, self.task.vocab_size)

    def batch(self, indices: Indices) -> Batch:
        prefix = self.prefixes(np.asarray(indices, dtype=np.int64))
        answer = {
            "reverse": [prefix[:, ::-1]],
            "copy": [prefix],
            "copy_reverse": [prefix, prefix[:, ::-1]],
        }[self.task.layout]
        delimiter = np.full((len(prefix), 1), DELIMITER)
        sequence = torch.from_numpy(np.concatenate([prefix, delimiter, *answer], axis=1))
        targets = sequence[:, 1:].clone()
        targets[:, : self.prefix_len] = IGNORE
        batch = Batch(inputs=sequence[:, :-1].contiguous(), targets=targets)
        if self.task.start_token is None:
            return batch
        return with_source(batch, self.prefix_len + 1, self.task.start_token)
