"""Sorting: read random numbers, then, after a delimiter, write them in ascending order.

An example, vocab_size 10, seq_len 8 ("|" is token 0; "." is a target that is not scored):

    inputs    5 9 3 5 | 3 5 5
    targets   . . . . 3 5 5 9

Numbers are uniform in 1 .. vocab_size - 1 and may repeat. With `source` the numbers and the delimiter are the source of an encoder-decoder,
and the answer stands alone behind the delimiter:

    source    5 9 3 5 |
    inputs    | 3 5 5
    targets   3 5 5 9
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lab.tasks.base import IGNORE, Batch, with_source
from lab.tasks.synthetic import Draw, Synthetic

DELIMITER = 0


class Sorting(Synthetic):
    def __init__(
        self,
        vocab_size: int = 64,
        seq_len: int = 32,
        n_train: int = 100000,
        n_val: int = 1000,
        n_test: int = 1000,
        seed: int = 0,
        free_samples: int = 256,
        eval_lengths: Sequence[int] = (1,),
        reference: Mapping[str, Any] | None = None,
        source: bool = False,
    ) -> None:
        if vocab_size < 3:
            raise ValueError(f"task.vocab_size must be at least 3 (the delimiter and two numbers), got {vocab_size}")
        if seq_len < 2 or seq_len % 2:
            raise ValueError(f"task.seq_len must be a positive multiple of 2, got {seq_len}")
        super().__init__(vocab_size, seq_len, n_train, n_val, n_test, seed, eval_lengths, reference)
        self.prompt_len, self.start_token = (1, DELIMITER) if source else (seq_len // 2 + 1, None)
        self.free_samples = free_samples

    def rows(self, draw: Draw, seq_len: int) -> Batch:
        n = seq_len // 2
        numbers = draw.integers("numbers", n, DELIMITER + 1, self.vocab_size)
        delimiter = np.full((len(numbers), 1), DELIMITER)
        sequence = np.concatenate([numbers, delimiter, np.sort(numbers, 1)], 1)
        targets = sequence[:, 1:].copy()
        targets[:, :n] = IGNORE
        batch = Batch(torch.from_numpy(sequence[:, :-1].copy()), torch.from_numpy(targets))
        return batch if self.start_token is None else with_source(batch, n + 1, self.start_token)
