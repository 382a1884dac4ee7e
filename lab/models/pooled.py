"""The head of a classifier: one answer, or several, for a whole input."""

from __future__ import annotations

from typing import Literal, cast, get_args

from torch import Tensor, nn

from lab.mixers.base import check_at_least
from lab.models.base import last_real, mean_real

Pool = Literal["mean", "last"]


class PooledHead(nn.Linear):
    """x (B, L, D) -> logits (B, n_classes), of the mean or the last of the real tokens; with n_answers > 1 (B, n_answers, n_classes)."""

    def __init__(self, d_model: int, n_classes: int, pool: Pool = "mean", n_answers: int = 1) -> None:
        check_at_least("PooledHead", 1, n_classes=n_classes, n_answers=n_answers)
        if pool not in get_args(Pool):
            raise ValueError(f"PooledHead: pool={pool!r}; expected {' or '.join(get_args(Pool))}")
        super().__init__(d_model, n_classes * n_answers)
        self.pool, self.n_answers, self.n_classes = pool, n_answers, n_classes

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        logits = super().forward(mean_real(x, lengths) if self.pool == "mean" else last_real(x, lengths)[:, 0])
        return logits if self.n_answers == 1 else cast(Tensor, logits.unflatten(-1, (self.n_answers, self.n_classes)))
