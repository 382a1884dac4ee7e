"""Parity: is the number of ones so far even or odd? The smallest task that needs a state which every token can flip.

    inputs    1 0 1 1 0
    targets   1 1 0 1 1        running: after each token
    targets   . . . . 1        without: after the last alone ("." is a target that is not scored)

Tokens are 0 and 1, each as likely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lab.tasks.base import IGNORE, Batch
from lab.tasks.synthetic import Draw, Synthetic


class Parity(Synthetic):
    next_token = False

    def __init__(
        self,
        vocab_size: int = 2,
        seq_len: int = 40,
        running: bool = True,
        n_train: int = 100000,
        n_val: int = 1000,
        n_test: int = 1000,
        seed: int = 0,
        eval_lengths: Sequence[int] = (1,),
        reference: Mapping[str, Any] | None = None,
    ) -> None:
        if vocab_size != 2:
            raise ValueError(f"task.vocab_size must be 2, the tokens are 0 and 1; got {vocab_size}")
        if seq_len < 1:
            raise ValueError(f"task.seq_len must be at least 1, got {seq_len}")
        self.running = running
        super().__init__(vocab_size, seq_len, n_train, n_val, n_test, seed, eval_lengths, reference)

    def rows(self, draw: Draw, seq_len: int) -> Batch:
        inputs = torch.from_numpy(draw.integers("bits", seq_len, 0, 2))
        targets = inputs.cumsum(1) % 2
        if not self.running:
            targets[:, :-1] = IGNORE
        return Batch(inputs, targets)
