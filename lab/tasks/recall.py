"""In-context recall: a sequence of pairs, a key always with the same value; what is the value of a key that was seen before?

An example, vocab_size 9, seq_len 10: keys are 0 .. 3, values 4 .. 7 ("." is a target that is not scored):

    inputs    2 5 0 4 3 5 2 5 0 4        multi_query: each value whose key was there before is scored
    targets   . . . . . . 5 . 4 .

    inputs    2 5 0 4 3 5 1 7 * 3        without: only the last, announced by "*", token vocab_size - 1
    targets   . . . . . . . . . 5

noise: that share of pairs is replaced by two tokens that mean nothing, of n_noise at the end of the vocabulary. Keys and values are drawn
for each row, values may be shared. Each row has at least one pair that can be asked for. The distance goes from the last time that the key
was seen; pairs are the different keys before the query. Sources: arXiv:2212.14052, section 3.1 (associative recall, one query), and the
in-context and noisy recall of MAD, arXiv:2403.17844, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lab.tasks.base import IGNORE, Batch
from lab.tasks.synthetic import Draw, Synthetic


class InContextRecall(Synthetic):
    by = ("distance", "pairs")

    def __init__(
        self,
        vocab_size: int = 16,
        seq_len: int = 128,
        multi_query: bool = True,
        noise: float = 0.0,
        n_noise: int = 0,
        n_train: int = 12800,
        n_val: int = 1280,
        n_test: int = 1280,
        seed: int = 0,
        eval_lengths: Sequence[int] = (1,),
        reference: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= noise < 1:
            raise ValueError(f"task.noise is a share of the pairs, from 0 to below 1, got {noise}")
        if noise and n_noise < 1:
            raise ValueError(f"task.n_noise must be at least 1 where task.noise is above 0, got {n_noise}")
        symbols = vocab_size - n_noise - (not multi_query)
        if symbols < 4:
            raise ValueError(
                f"task.vocab_size must hold two keys and two values beside {vocab_size - symbols} other tokens, got {vocab_size}"
            )
        if seq_len % 2 or seq_len < 4:
            raise ValueError(f"task.seq_len must be even and at least 4 (a pair and a query), got {seq_len}")
        self.next_token = multi_query  # whose answers follow in the inputs
        self.multi_query, self.noise, self.n_noise, self.n_keys, self.n_symbols = multi_query, noise, n_noise, symbols // 2, symbols
        super().__init__(vocab_size, seq_len, n_train, n_val, n_test, seed, eval_lengths, reference)

    def rows(self, draw: Draw, seq_len: int) -> Batch:
        B, P = len(draw), seq_len // 2
        row = np.arange(B)
        keys = draw.integers("keys", P, 0, self.n_keys)
        noisy = draw.uniform("noisy", P) < self.noise
        noisy[:, -1] = False
        first = draw.integers("first", 1, 0, P - 1)[:, 0]  # the pair that is always there
        noisy[row, first] = False
        keys[:, -1] = keys[row, self._asked(draw, noisy)]
        table = draw.integers("values", self.n_keys, self.n_keys, self.n_symbols)  # (B, K): the value of each key
        pairs = np.stack([keys, np.take_along_axis(table, keys, 1)], -1)  # (B, P, 2)
        if self.noise:
            pairs[noisy] = draw.integers("noise", 2 * P, self.n_symbols, self.n_symbols + self.n_noise).reshape(B, P, 2)[noisy]
        last, seen = self._before(np.where(noisy, -1, keys))
        inputs = pairs.reshape(B, seq_len)
        scored = (last >= 0) if self.multi_query else np.arange(P) == np.full((B, 1), P - 1)
        place = 2 * np.arange(P)
        if not self.multi_query:  # the last pair is: the announcement, then the key
            inputs[:, -1], inputs[:, -2] = keys[:, -1], self.vocab_size - 1
            place[-1] += 1
        targets, distance, count = np.full_like(inputs, IGNORE), np.zeros_like(inputs), np.zeros_like(inputs)
        targets[:, place] = np.where(scored, np.take_along_axis(table, keys, 1), IGNORE)
        distance[:, place] = np.where(scored, place - 2 * last, 0)
        count[:, place] = seen
        by = {"distance": torch.from_numpy(distance), "pairs": torch.from_numpy(count)}
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), by=by)

    def _asked(self, draw: Draw, noisy: np.ndarray) -> np.ndarray:
        """(B,) the pair whose key is asked for at the end, one of those that are no noise, each equally likely."""
        order = np.where(noisy[:, :-1], 2.0, draw.uniform("asked", noisy.shape[1] - 1))
        return order.argmin(1)

    def _before(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """keys (B, P), -1 for noise -> for each pair, the last one before it with its key (-1: none), and the different keys before it."""
        P = keys.shape[1]
        at = np.where(keys[:, :, None] == np.arange(self.n_keys), np.arange(P)[:, None], -1)  # (B, P, K)
        latest = np.maximum.accumulate(at, axis=1)
        before = np.concatenate([np.full_like(latest[:, :1], -1), latest[:, :-1]], axis=1)
        last = np.take_along_axis(before, np.maximum(keys, 0)[:, :, None], 2)[:, :, 0]
        return np.where(keys < 0, -1, last), (before >= 0).sum(2)
