"""Multi-query associative recall (MQAR): pairs of keys and values, then every key once more, in any order: what was its value?

An example, vocab_size 12, seq_len 16, n_pairs 2: keys are 1 .. 5, values 6 .. 11 ("." is an input of 0, or a target that is not scored):

    inputs    2 8 4 7 . . 4 . . . . . 2 . . .
    targets   . . . . . . 7 . . . . . 8 . . .

Keys of a row differ, and so do values. Queries stand at even distances after the pairs, 2 i with a probability proportional to
(i + 1)^(power - 1): most come soon, as repeated words in a text do; power 1 is uniform. noise: the empty places hold random tokens instead
of 0. The distance goes from the key to its query. Source: arXiv:2312.04927, section 3 and appendix E: vocab_size 8192, and 4 pairs in 64
tokens up to 64 pairs in 512. At a longer evaluation the pairs stay as many, and the queries spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lab.tasks.base import IGNORE, Batch
from lab.tasks.synthetic import Draw, Synthetic


class MQAR(Synthetic):
    """n_pairs: how many, or a list of which each row has one; accuracy is reported by it."""

    next_token = False  # an answer is not among the inputs
    by = ("distance", "pairs")

    def __init__(
        self,
        vocab_size: int = 8192,
        seq_len: int = 64,
        n_pairs: int | Sequence[int] = 4,
        power: float = 0.01,
        noise: bool = False,
        n_train: int = 100000,
        n_val: int = 3000,
        n_test: int = 3000,
        seed: int = 0,
        eval_lengths: Sequence[int] = (1,),
        reference: Mapping[str, Any] | None = None,
    ) -> None:
        self.n_pairs = np.array([n_pairs] if isinstance(n_pairs, int) else list(n_pairs))
        most = int(self.n_pairs.max(initial=0))
        if not len(self.n_pairs) or self.n_pairs.min() < 1:
            raise ValueError(f"task.n_pairs must be at least 1, or a list of such numbers, got {n_pairs}")
        if seq_len % 2 or seq_len < 4 * most:
            raise ValueError(
                f"task.seq_len must be even and at least {4 * most}, 4 times the pairs (key, value, query, and its room), got {seq_len}"
            )
        if vocab_size < 2 * most + 2:
            raise ValueError(f"task.vocab_size must be at least {2 * most + 2} (0, a key and a value for each pair), got {vocab_size}")
        if not power > 0:
            raise ValueError(f"task.power must be above 0 (1: uniform), got {power}")
        self.most, self.power, self.noise = most, power, noise
        super().__init__(vocab_size, seq_len, n_train, n_val, n_test, seed, eval_lengths, reference)

    def rows(self, draw: Draw, seq_len: int) -> Batch:
        P, half = self.most, self.vocab_size // 2
        n = self.n_pairs[draw.integers("pairs", 1, 0, len(self.n_pairs))]  # (B, 1)
        there = np.arange(P) < n  # (B, P): the pairs that a row has
        keys, values = draw.distinct("keys", P, 1, half), draw.distinct("values", P, half, self.vocab_size)
        start = 2 * np.broadcast_to(np.arange(P), keys.shape)
        query = 2 * n + 2 * self._gaps(draw, seq_len, n)  # (B, P)
        rows = np.broadcast_to(np.arange(len(n))[:, None], keys.shape)[there]
        inputs = draw.integers("noise", seq_len, 0, self.vocab_size) if self.noise else np.zeros((len(n), seq_len), np.int64)
        targets, distance = np.full_like(inputs, IGNORE), np.zeros_like(inputs)
        inputs[rows, start[there]] = inputs[rows, query[there]] = keys[there]
        inputs[rows, start[there] + 1] = targets[rows, query[there]] = values[there]
        distance[rows, query[there]] = (query - start)[there]
        by = {"distance": torch.from_numpy(distance), "pairs": torch.from_numpy(n).expand(-1, seq_len)}
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), by=by)

    def _gaps(self, draw: Draw, seq_len: int, n: np.ndarray) -> np.ndarray:
        """(B, P) different numbers of 0 .. seq_len / 2 - n - 1, drawn one after the other, with the weights (i + 1)^(power - 1) of those
        left.

        Equal in distribution to the order of exponential waiting times with these rates (Efraimidis and Spirakis, 2006). As many are drawn
        for each row as the one with the fewest pairs needs: what a row draws must not depend on the rows beside it.
        """
        i = np.arange(seq_len // 2 - int(self.n_pairs.min()))
        waiting = -np.log(draw.uniform("gaps", len(i))) / (i + 1.0) ** (self.power - 1)
        return np.argsort(np.where(i < seq_len // 2 - n, waiting, np.inf), axis=1)[:, : self.most]
