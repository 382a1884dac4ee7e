"""What a query may attend to: the patterns of attention, and masks that a caller gives.

A mask is boolean, True = may attend: (L, S) for all rows, (B, L, S), or (B, H, L, S), where B, H and L may be 1, as in (B, 1, 1, S) for
padding. A mask of numbers, 0 and 1, means the opposite in every second library, so it is an error unless mask_convention says what 1 is:
"attend" (may attend) or "hide" (may not). A query that may attend to nothing gets zeros.

B = batch, H = heads, L = queries, S = keys.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lab.ops.backend import recording

MaskConvention: TypeAlias = Literal["attend", "hide"]


class Pattern(NamedTuple):
    bidirectional: bool = False
    window: int | None = None
    slopes: Tensor | None = None  # (H,), of ALiBi
    given: Tensor | None = None  # of the caller, by `may_attend`

    def is_plain(self, lengths: Tensor | None) -> bool:
        """Whether a sequence from its beginning needs no mask: causal, or all of it."""
        return self.window is None and self.slopes is None and self.given is None and not (self.bidirectional and lengths is not None)

    def mask(self, places: Tensor, S: int, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """places (B or 1, L) of the queries, S keys, lengths (B,) of which are real -> the mask (B or 1, H or 1, L, S), boolean or to be
        added to the scores, and which queries see nothing (B or 1, H or 1, L, 1), None where there can be none."""
        behind = places[..., None] - torch.arange(S, device=places.device)  # (B or 1, L, S)
        sees = behind < S if self.bidirectional else behind >= 0
        if self.window is not None:
            sees = sees & (behind.abs() < self.window)
        if self.bidirectional and lengths is not None:
            sees = sees & real(lengths, S, places.device)[:, None]
        sees, empty = sees[:, None], None
        if self.given is not None:
            sees = sees & self.given
        if self.given is not None or (self.bidirectional and lengths is not None):
            sees, empty = never_empty(sees)
        if self.slopes is None:
            return sees, empty
        bias = -self.slopes[:, None, None] * behind.abs()[:, None]
        return bias.masked_fill(~sees, float("-inf")), empty


def real(lengths: Tensor, S: int, device: torch.device) -> Tensor:
    """(B,) -> (B, S), which of S right-padded tokens are real."""
    return torch.arange(S, device=device) < lengths.to(device)[:, None]


def never_empty(sees: Tensor) -> tuple[Tensor, Tensor]:
    """sees (..., S) -> the same, where queries that see nothing see all, so that no softmax is NaN; and which these are (..., 1)."""
    empty = ~sees.any(-1, keepdim=True)
    return sees | empty, empty


def slopes(n_heads: int) -> Tensor:
    """(H,) of ALiBi: 2^(-8 h / H) for powers of two; for others those of the next smaller power, and every second of the next larger."""
    n = 2 ** int(math.log2(n_heads))
    exact = [2.0 ** (-8 * h / n) for h in range(1, n + 1)]
    return torch.tensor(exact + [2.0 ** (-4 * h / n) for h in range(1, 2 * (n_heads - n), 2)])


def check_convention(owner: str, convention: MaskConvention | None) -> None:
    if convention not in (None, "attend", "hide"):
        raise ValueError(f"{owner}: mask_convention={convention!r}; expected attend (1 = may attend), hide (1 = may not) or None")


def may_attend(owner: str, mask: Tensor, convention: MaskConvention | None, sizes: tuple[int, int, int, int]) -> Tensor:
    """A caller's mask as a boolean one (B or 1, H or 1, L or 1, S or 1). sizes: B, H, L, S."""
    if mask.dtype != torch.bool:
        if convention is None:
            raise ValueError(
                f"{owner}: the mask is {mask.dtype}; a boolean one (True = may attend) needs no more, one of 0 and 1 needs "
                "mask_convention, attend (1 = may attend) or hide (1 = may not)"
            )
        if not recording() and mask.device.type == "cpu" and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"{owner}: the mask has values other than 0 and 1; what is added to the scores is no mask")
        mask = mask == (1 if convention == "attend" else 0)
    full = {2: mask[None, None], 3: mask[:, None], 4: mask}.get(mask.ndim) if mask.ndim > 1 else None
    if full is None or any(got not in (1, size) for got, size in zip(full.shape, sizes, strict=True)):
        B, H, L, S = sizes
        raise ValueError(f"{owner}: the mask is {tuple(mask.shape)}; expected ({L}, {S}), ({B}, {L}, {S}) or ({B}, {H}, {L}, {S})")
    return full
