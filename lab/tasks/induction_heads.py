"""Induction heads: a special token stands at a random place, followed by some token; when it comes again, what follows it?

    random  random  *  x  random  random  ...  random  *        the answer after the last token: x

An example, vocab_size 10, seq_len 9 ("*" is token 0; "." is a target that is not scored):

    inputs    4 7 * 3 9 1 1 5 *
    targets   . . . . . . . . 3

The special token stands at one place before the end, each equally likely; all other tokens are uniform in 1 .. vocab_size - 1. The distance
goes from the special token to its second coming. Source: arXiv:2312.00752, section 4.1.2: trained at length 256, tested up to 2^20; and
arXiv:2212.14052, section 3.1, at length 30.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lab.tasks.base import IGNORE, Batch
from lab.tasks.synthetic import Draw, Synthetic

SPECIAL = 0


class InductionHeads(Synthetic):
    next_token = False  # an answer is not among the inputs
    by = ("distance",)

    def __init__(
        self,
        vocab_size: int = 16,
        seq_len: int = 256,
        n_train: int = 1000000,
        n_val: int = 1000,
        n_test: int = 1000,
        seed: int = 0,
        eval_lengths: Sequence[int] = (1,),
        reference: Mapping[str, Any] | None = None,
    ) -> None:
        if vocab_size < 3:
            raise ValueError(f"task.vocab_size must be at least 3 (the special token and two others), got {vocab_size}")
        if seq_len < 3:
            raise ValueError(f"task.seq_len must be at least 3 (the special token, the answer, the special token), got {seq_len}")
        super().__init__(vocab_size, seq_len, n_train, n_val, n_test, seed, eval_lengths, reference)

    def rows(self, draw: Draw, seq_len: int) -> Batch:
        inputs = draw.integers("tokens", seq_len, SPECIAL + 1, self.vocab_size)
        place = draw.integers("place", 1, 0, seq_len - 2)
        np.put_along_axis(inputs, place, SPECIAL, axis=1)
        inputs[:, -1] = SPECIAL
        targets = np.full_like(inputs, IGNORE)
        targets[:, -1:] = np.take_along_axis(inputs, place + 1, axis=1)
        distance = torch.from_numpy(seq_len - 1 - place).expand(-1, seq_len)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), by={"distance": distance})
