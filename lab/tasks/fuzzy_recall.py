"""Fuzzy recall (MAD): in-context recall whose keys and values are one to three tokens long, so that a model must see where each ends.

An example, vocab_size 12, seq_len 14: key tokens are 0 .. 4, value tokens 5 .. 9, "_" fills up on the left ("." is not scored):

    sequence  _ _  2 1 7  4 8 6  3 9 5 8  2 1 7        pairs (2 1, 7), (4, 8 6), (3, 9 5 8), and the first key again
    inputs    _ _ 2 1 7 4 8 6 3 9 5 8 2 1
    targets   . . . . . . . . . . . . . 7

Each pair draws the length of its key, then a key of that length without a token twice; in a row a key always has the same value, drawn
likewise. The last key is one that was there before. All tokens of the value of a key that was there before are scored, with those before
them given. The distance goes back to the same token of the last time. Source: arXiv:2403.17844, section 3.1. There a model is trained on
each next token, and tested with the longest keys alone; here both are as above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import torch

from lab.tasks.base import IGNORE, Batch
from lab.tasks.synthetic import Draw, Synthetic


class FuzzyRecall(Synthetic):
    """max_key, max_value: the most tokens of a key and of a value."""

    by = ("distance",)

    def __init__(
        self,
        vocab_size: int = 16,
        seq_len: int = 128,
        max_key: int = 3,
        max_value: int = 3,
        n_train: int = 12800,
        n_val: int = 1280,
        n_test: int = 1280,
        seed: int = 0,
        eval_lengths: Sequence[int] = (1,),
        reference: Mapping[str, Any] | None = None,
    ) -> None:
        half = (vocab_size - 1) // 2
        for name, value in (("max_key", max_key), ("max_value", max_value)):
            if not 1 <= value <= half:
                raise ValueError(
                    f"task.{name} must be between 1 and {half}, the tokens that vocab_size {vocab_size} has for it, got {value}"
                )
        self.longest = max_key + max_value
        if seq_len < 2 * self.longest:
            raise ValueError(f"task.seq_len must be at least {2 * self.longest}, two pairs of the longest, got {seq_len}")
        self.fill = vocab_size - 1
        self.keys, self.values = _motifs(range(half), max_key), _motifs(range(half, 2 * half), max_value)
        super().__init__(vocab_size, seq_len, n_train, n_val, n_test, seed, eval_lengths, reference)

    def rows(self, draw: Draw, seq_len: int) -> Batch:
        B, P = len(draw), seq_len // 2 + 1
        keys = self._choice(draw, "keys", self.keys, P)  # (B, P) rows of self.keys
        table = self._choice(draw, "values", self.values, len(self.keys[0]))  # (B, K) the value of each key
        values = np.take_along_axis(table, keys, 1)
        sizes = self.keys[1][keys] + self.values[1][values]
        there = sizes.cumsum(1) <= seq_len + 1 - self.longest  # the first pairs, as many as fit before the last one
        n = there.sum(1, keepdims=True)
        asked = np.minimum((draw.uniform("asked", 1) * n).astype(np.int64), n - 1)
        np.put_along_axis(keys, n, np.take_along_axis(keys, asked, 1), 1)
        np.put_along_axis(values, n, np.take_along_axis(values, asked, 1), 1)
        there = np.arange(P) <= n
        sizes = np.where(there, self.keys[1][keys] + self.values[1][values], 0)
        end = sizes.cumsum(1)
        start = end - sizes + seq_len + 1 - end[:, -1:]  # (B, P), the sequence ends with the last pair
        same = (keys[:, :, None] == keys[:, None, :]) & (np.arange(P)[:, None] > np.arange(P)) & there[:, None, :]  # (B, P, P)
        seen = same.any(2) & there
        last = P - 1 - same[:, :, ::-1].argmax(2)
        back = start - np.take_along_axis(start, last, 1)  # to the same key, whose value has the same length

        sequence = np.full((B, seq_len + 1), self.fill)
        targets, distance = np.full((B, seq_len + 1), IGNORE), np.zeros((B, seq_len + 1), np.int64)
        row = np.broadcast_to(np.arange(B)[:, None], keys.shape)
        for (tokens, lengths), chosen, offset in ((self.keys, keys, 0), (self.values, values, self.keys[1][keys])):
            for i in range(tokens.shape[1]):
                has = there & (i < lengths[chosen])
                place = (row[has], (start + offset + i)[has])
                sequence[place] = tokens[chosen, i][has]
                if tokens is self.values[0]:
                    targets[place] = np.where(seen[has], tokens[chosen, i][has], IGNORE)
                    distance[place] = np.where(seen[has], back[has], 0)
        parts = (torch.from_numpy(np.ascontiguousarray(part)) for part in (sequence[:, :-1], targets[:, 1:], distance[:, 1:]))
        inputs, wanted, by = parts
        return Batch(inputs, wanted, by={"distance": by})

    def _choice(self, draw: Draw, what: str, motifs: tuple[np.ndarray, np.ndarray], n: int) -> np.ndarray:
        """(B, n) rows of the motifs: the length, each as likely, then one of that length."""
        counts = np.bincount(motifs[1])[1:]
        first = np.concatenate([[0], counts.cumsum()[:-1]])
        size = draw.integers(f"{what}/length", n, 0, len(counts))
        return first[size] + (draw.uniform(what, n) * counts[size]).astype(np.int64)


def _motifs(tokens: range, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """All orders of 1 .. longest different tokens: (K, longest), padded, and (K,) their lengths, ascending."""
    found = [motif for n in range(1, longest + 1) for motif in permutations(tokens, n)]
    return np.array([[*motif, *[0] * (longest - len(motif))] for motif in found]), np.array([len(motif) for motif in found])
