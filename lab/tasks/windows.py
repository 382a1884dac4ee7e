"""Windows over the tokens of a split, whose targets are all of its tokens, each exactly once.

    tokens     i m p o r t   r e          one split; windows of context 4, stride 4
    inputs     S i m p     o r t .        the token before each target; the first token of a split is predicted from a start token S
    targets    i m p o       r t . r

With a smaller stride windows overlap, and each scores only what no window before it has scored, so that a token has at least
context - stride tokens before it in its window. The last window is moved back to end with the split: all windows are of one length.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from lab.tasks.base import IGNORE, Batch, Indices, Split
from lab.tasks.prepared import Tokens


class Windows(Split):
    """Of tokens that are at least `context`. Window k ends at context + k stride, or at the end. start: the token before the first one.
    token_bytes (V,): bytes of text that each token stands for; None: one each."""

    def __init__(self, tokens: Tokens, context: int, stride: int, start: int, token_bytes: np.ndarray | None = None) -> None:
        self.tokens, self.context, self.stride, self.start, self.token_bytes = tokens, context, stride, start, token_bytes
        self.n = len(tokens)

    def __len__(self) -> int:
        return 1 + math.ceil((self.n - self.context) / self.stride)

    def ends(self, indices: np.ndarray) -> np.ndarray:
        """Where windows end and the ones before them have ended: (B,) -> (B,) in [context, n]; 0 before the first."""
        return np.where(indices < 0, 0, np.minimum(self.context + indices * self.stride, self.n))

    def at(self, places: np.ndarray) -> Batch:
        """The windows that begin at these tokens, all of their targets scored: (B,) in [0, n - context]."""
        place = places[:, None] + np.arange(-1, self.context)  # (B, 1 + L): the token before each window, and the window
        tokens = self.tokens.array[place].astype(np.int64)  # place -1 is the last token, for a moment
        tokens[place < 0] = self.start
        return Batch(inputs=torch.from_numpy(tokens[:, :-1].copy()), targets=torch.from_numpy(tokens[:, 1:].copy()))

    def batch(self, indices: Indices) -> Batch:
        rows = np.asarray(indices, dtype=np.int64)
        first = self.ends(rows) - self.context
        batch = self.at(first)
        scored_before = (self.ends(rows - 1) - first)[:, None]
        batch.targets[torch.from_numpy(np.arange(self.context) < scored_before)] = IGNORE
        return batch

    def facts(self) -> dict[str, Any]:
        return self.scored(np.array([0]), np.array([self.n])) | {"context": self.context, "stride": self.stride}

    def scored(self, first: np.ndarray, end: np.ndarray) -> dict[str, int]:
        """How much text the tokens between these places are."""
        n = int((end - first).sum())
        if self.token_bytes is None:
            return {"scored_bytes": n}
        size, array = 1 << 20, self.tokens.array
        pieces = ((a, min(a + size, b)) for low, b in zip(first.tolist(), end.tolist(), strict=True) for a in range(low, b, size))
        return {"scored_bytes": sum(int(self.token_bytes[array[a:b]].sum()) for a, b in pieces), "scored_tokens": n}


class Part(Split):
    """Some windows of a split."""

    def __init__(self, whole: Windows, indices: np.ndarray) -> None:
        self.whole, self.indices = whole, indices

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Indices) -> Batch:
        return self.whole.batch(self.indices[np.asarray(indices, dtype=np.int64)])

    def facts(self) -> dict[str, Any]:
        context = {"context": self.whole.context, "stride": self.whole.stride}
        return self.whole.scored(self.whole.ends(self.indices - 1), self.whole.ends(self.indices)) | context
