"""Memorisation (MAD): what is the value of this key? The pairs are the same in every sample: facts, which only the weights can hold.

An example, vocab_size 9, seq_len 6: keys are 0 .. 3, values 4 .. 7, "?" is token 8 ("." is a target that is not scored):

    inputs    2 ? 0 ? 2 ?
    targets   . 5 . 7 . 5

Keys are drawn for each place; the value of each key is fixed by the seed, in all splits, and no two keys have the same one. Source:
arXiv:2403.17844, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lab.tasks.base import IGNORE, Batch
from lab.tasks.synthetic import Draw, Synthetic


class Memorization(Synthetic):
    next_token = False

    def __init__(
        self,
        vocab_size: int = 256,
        seq_len: int = 32,
        n_train: int = 256,
        n_val: int = 1280,
        n_test: int = 1280,
        seed: int = 0,
        eval_lengths: Sequence[int] = (1,),
        reference: Mapping[str, Any] | None = None,
    ) -> None:
        if vocab_size < 5:
            raise ValueError(f"task.vocab_size must be at least 5 (two keys, two values, the question), got {vocab_size}")
        if seq_len < 2 or seq_len % 2:
            raise ValueError(f"task.seq_len must be a positive multiple of 2, a key and its question, got {seq_len}")
        super().__init__(vocab_size, seq_len, n_train, n_val, n_test, seed, eval_lengths, reference)
        self.n_keys = (vocab_size - 1) // 2
        self.values = Draw(seed, "facts", np.zeros(1, np.int64)).distinct("values", self.n_keys, self.n_keys, 2 * self.n_keys)[0]

    def rows(self, draw: Draw, seq_len: int) -> Batch:
        keys = draw.integers("keys", seq_len // 2, 0, self.n_keys)
        inputs = np.full((len(keys), seq_len), self.vocab_size - 1)
        targets = np.full_like(inputs, IGNORE)
        inputs[:, ::2], targets[:, 1::2] = keys, self.values[keys]
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))
