"""Strata: one sequence at several clocks, and the routes between them (LaminarNet's Cross-Stratum Routing).

A token of the coarse stratum stands for a window of q tokens of the fine one. It exists once its window is complete, and is seen from the
last token of that window on: fine token t sees coarse tokens up to floor((t + 1) / q) - 1.

B = batch, F = tokens of the fine stratum in a chunk, C = tokens of the coarse one, D = d_model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.mixers.base import at_least_float32


class Windows(NamedTuple):
    """Where the tokens of a chunk stand in the windows of the next stratum. If all rows begin at the same place, the usual case, `offset`
    is a number, and windows are made by a reshape. Otherwise they are gathered."""

    q: int  # tokens of a window
    fine: int  # F, padding included
    coarse: int  # C, padding included: no row completes more windows
    offset: int | Tensor  # tokens of the first window that came before the chunk: of all rows, or (B,)
    real: Tensor | None  # (B,) fine tokens that are no padding; None: all
    complete: Tensor | None  # (B,) windows that the chunk completes; None: all C of them

    def means(self, x: Tensor, before: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """x (B, F, D), before (B, D) the sum of what came before of the first window, None for nothing -> the mean of each window
        (B, C, D), and if it is wanted the sum of the last, incomplete one (B, D)."""
        kind = x.dtype
        x = at_least_float32(x)
        sums = self.gathered(x, self.offset) if isinstance(self.offset, Tensor) else self.reshaped(x, self.offset)
        if before is not None:
            first = torch.arange(self.coarse, device=x.device) == 0
            sums = sums + before[:, None] * first[:, None]
        return (sums / self.q).to(kind), self.begun(x, before) if wanted else None

    def reshaped(self, x: Tensor, offset: int) -> Tensor:
        x = F.pad(x, (0, 0, offset, 0)) if offset else x
        return x[:, : self.coarse * self.q].unflatten(1, (-1, self.q)).sum(2)

    def gathered(self, x: Tensor, offset: Tensor) -> Tensor:
        slots = torch.arange(self.coarse, device=x.device)[:, None] * self.q + torch.arange(self.q, device=x.device)
        place = slots - offset[:, None, None]  # (B, C, q)
        inside = (place >= 0) & (place < (self.fine if self.real is None else self.real[:, None, None]))
        rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
        return (x[rows, place.clamp(min=0).clamp(max=self.fine - 1)] * inside[..., None]).sum(2)

    def begun(self, x: Tensor, before: Tensor | None) -> Tensor:
        """The sum of the last window (B, D), which the chunk does not complete."""
        if self.complete is None and not isinstance(self.offset, Tensor):
            rest = x[:, max(0, self.coarse * self.q - self.offset) :].sum(1)
            return rest if before is None or self.coarse else rest + before
        complete = torch.full((x.shape[0],), self.coarse, device=x.device) if self.complete is None else self.complete
        place = torch.arange(self.fine, device=x.device)
        inside = place >= (complete * self.q - self.offset)[:, None]
        if self.real is not None:
            inside = inside & (place < self.real[:, None])
        rest = (x * inside[..., None]).sum(1)
        return rest if before is None else rest + before * (complete == 0)[:, None]

    def held(self, messages: Tensor, before: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """messages (B, C, D), before (B, D) the newest one of an earlier chunk, None for none, which is zero -> for each fine token the
        newest message (B, F, D), and if it is wanted the last one (B, D)."""
        B, _, D = messages.shape
        every = torch.cat([messages.new_zeros(B, 1, D) if before is None else before[:, None].to(messages.dtype), messages], 1)
        if isinstance(self.offset, Tensor):
            newest = (self.offset[:, None] + torch.arange(self.fine, device=every.device) + 1) // self.q
            held = every.gather(1, newest[..., None].expand(-1, -1, D))
        else:
            repeated = every[:, :, None].expand(-1, -1, self.q, -1).flatten(1, 2)
            held = repeated[:, self.offset + 1 : self.offset + 1 + self.fine]
        if not wanted:
            return held, None
        if self.complete is None:
            return held, at_least_float32(every[:, -1]).clone()
        return held, at_least_float32(every.gather(1, self.complete[:, None, None].expand(-1, 1, D))[:, 0])


def windows_of(ratios: tuple[int, ...], tokens: int, start: int | Tensor, real: Tensor | None, free: bool = False) -> list[Windows]:
    """Of a chunk of so many tokens, between each two strata. ratios: tokens of each stratum's window. start: tokens before the chunk, of
    all rows or (B,). real (B,): tokens that are no padding. free: the number of tokens may be any, and no number of windows that follows
    from it may be 0 or 1, which a recorded graph would take for constants."""
    found = []
    fine = tokens
    for ratio, next_ratio in zip(ratios, ratios[1:], strict=False):
        q, offset = next_ratio // ratio, start // ratio % (next_ratio // ratio)
        if isinstance(offset, Tensor):
            coarse = fine // q + 2 if free else (fine + q - 1) // q
            complete: Tensor | None = (offset + (fine if real is None else real)) // q
        else:
            coarse = (offset + fine) // q
            complete = None if real is None else (offset + real) // q
        found.append(Windows(q, fine, coarse, offset, real, complete))
        fine, real = coarse, complete
    return found


class Route(nn.Module):
    """Between a stratum and the next coarser one. Upwards goes the gated mean of a window, downwards the gated coarse token."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.norm_fine, self.norm_coarse = nn.RMSNorm(d_model, eps=eps), nn.RMSNorm(d_model, eps=eps)
        self.gate_up, self.gate_down = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)

    def up(self, fine: Tensor, coarse: Tensor, windows: Windows, before: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """fine (B, F, D), coarse (B, C, D) -> the new coarse, and the sum of the window that has begun."""
        p, begun = windows.means(self.norm_fine(fine), before, wanted)
        return coarse + torch.sigmoid(self.gate_up(p)) * p, begun

    def down(self, fine: Tensor, coarse: Tensor, windows: Windows, before: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """-> the new fine, and the message that holds on."""
        c = self.norm_coarse(coarse)
        messages, last = windows.held(torch.sigmoid(self.gate_down(c)) * c, before, wanted)
        return fine + messages, last
