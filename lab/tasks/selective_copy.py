"""Selective copying: some data tokens stand at random places among blanks; at the end, repeat them in their order.

    blanks and data ...  |  n_data times "!"        the answers at the "!": the data tokens, first to last

An example, vocab_size 10, seq_len 12, n_data 3 ("_" is token 0, "!" token vocab_size - 1; "." is a target that is not scored):

    inputs    _ 4 _ _ _ 8 2 _ _ ! ! !
    targets   . . . . . . . . . 4 8 2

The places are any n_data of those before the "!", each choice equally likely; data tokens are uniform in 1 .. vocab_size - 2. Nothing that
a model says is fed back to it. The distance goes from a data token to its answer. At a longer evaluation there are more blanks and as much
data. Sources: arXiv:2312.00752, section 4.1.1: 4096 tokens, 16 data tokens, vocab_size 16; MAD, arXiv:2403.17844, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lab.tasks.base import IGNORE, Batch
from lab.tasks.synthetic import Draw, Synthetic

BLANK = 0


class SelectiveCopy(Synthetic):
    next_token = False  # an answer is not among the inputs
    by = ("distance",)

    def __init__(
        self,
        vocab_size: int = 16,
        seq_len: int = 4112,
        n_data: int = 16,
        n_train: int = 1000000,
        n_val: int = 1000,
        n_test: int = 1000,
        seed: int = 0,
        eval_lengths: Sequence[int] = (1,),
        reference: Mapping[str, Any] | None = None,
    ) -> None:
        if vocab_size < 4:
            raise ValueError(f"task.vocab_size must be at least 4 (the blank, two data tokens, the one that asks), got {vocab_size}")
        if n_data < 1:
            raise ValueError(f"task.n_data must be at least 1, got {n_data}")
        if seq_len < 2 * n_data:
            raise ValueError(f"task.seq_len must be at least {2 * n_data}, twice task.n_data (the data and the answers), got {seq_len}")
        self.n_data = n_data
        super().__init__(vocab_size, seq_len, n_train, n_val, n_test, seed, eval_lengths, reference)

    def rows(self, draw: Draw, seq_len: int) -> Batch:
        n, before = self.n_data, seq_len - self.n_data
        data = draw.integers("data", n, BLANK + 1, self.vocab_size - 1)
        place = draw.places("places", n, before)
        inputs = np.full((len(draw), seq_len), BLANK, dtype=np.int64)
        np.put_along_axis(inputs, place, data, axis=1)
        inputs[:, before:] = self.vocab_size - 1
        targets, distance = np.full_like(inputs, IGNORE), np.zeros_like(inputs)
        targets[:, before:], distance[:, before:] = data, np.arange(before, seq_len) - place
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), by={"distance": torch.from_numpy(distance)})
