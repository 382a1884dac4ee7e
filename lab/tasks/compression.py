"""Compression (MAD): a whole sequence must fit into one vector, the model's output at the last token, from which it is read back.

An example, vocab_size 8, seq_len 6 ("!" is token vocab_size - 1):

    inputs    4 0 3 3 6 !
    targets   4 0 3 3 6 .      all answers at once, from one vector ("." is not scored)

Tokens are uniform in 0 .. vocab_size - 2. The model has a pooled head with seq_len answers (Stack's n_answers), so that no answer can look
back at the input; pool=last is the published form. Source: arXiv:2403.17844, section 3.1; there the answers come from an MLP on the vector
and a position, here from one linear map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lab.config import ConfigError
from lab.tasks.base import IGNORE, Batch
from lab.tasks.synthetic import Draw, Synthetic, SyntheticSplit


class Compression(Synthetic):
    """n_classes, n_answers: those of the head, which follow from vocab_size and seq_len."""

    next_token = False

    def __init__(
        self,
        vocab_size: int = 16,
        seq_len: int = 32,
        n_classes: int = 16,
        n_answers: int = 32,
        n_train: int = 12800,
        n_val: int = 1280,
        n_test: int = 1280,
        seed: int = 0,
        reference: Mapping[str, Any] | None = None,
    ) -> None:
        if vocab_size < 3:
            raise ValueError(f"task.vocab_size must be at least 3 (two symbols and the last token), got {vocab_size}")
        if seq_len < 2:
            raise ValueError(f"task.seq_len must be at least 2 (a symbol and the last token), got {seq_len}")
        if (n_classes, n_answers) != (vocab_size, seq_len):
            problem = f"must be those of vocab_size {vocab_size} and seq_len {seq_len}, got {n_classes} and {n_answers}"
            raise ValueError(f"task.n_classes and n_answers {problem}")
        super().__init__(vocab_size, seq_len, n_train, n_val, n_test, seed, (1,), reference)
        self.n_classes, self.n_answers = n_classes, n_answers

    def split(self, name: str, scale: int = 1) -> SyntheticSplit:
        if scale != 1:
            raise ConfigError("task=compression has as many answers as its head: leave task.eval_lengths at [1]")
        return super().split(name)

    def rows(self, draw: Draw, seq_len: int) -> Batch:
        symbols = draw.integers("symbols", seq_len - 1, 0, self.vocab_size - 1)
        end = np.full((len(symbols), 1), self.vocab_size - 1)
        inputs = torch.from_numpy(np.concatenate([symbols, end], 1))
        return Batch(inputs, inputs.masked_fill(inputs == self.vocab_size - 1, IGNORE))
