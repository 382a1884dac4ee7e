"""Positions as rotations, with no table and so no last position.      arXiv:2104.09864, section 3.4.3

    w_i = base^(-i / n), i = 0 .. n - 1, n = D / 2, base 10000
    gate     z_t * (1 + gamma cos(t w + phi)),  z = W_in x;  gamma and phi are learned, one of each for a channel
    rotate   the pair (z_i, z_{i + n}) turned by the angle t w_i
    sinusoidal   E[token] + gain [sin t w; cos t w];  the gain is learned      arXiv:1706.03762, section 3.5

B = batch, L = length, D = channels, t = a token's place in its row. Places are (L,), or (B, L) where rows differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lab.ops.program import Program, Value

BASE = 10_000.0


def angles(places: Tensor, n: int, base: float = BASE) -> Tensor:
    """places (...), integers -> (..., n), t w_i less its whole turns. float64: at t = 10^6 an angle in float32 is wrong by 0.06."""
    w = torch.exp(torch.arange(n, device=places.device, dtype=torch.float64) * (-math.log(base) / n))
    angle = places.double()[..., None] * w
    return angle - 2 * math.pi * torch.floor(angle / (2 * math.pi))


def rotated(x: Tensor, places: Tensor, base: float = BASE) -> Tensor:
    """x (B, L, D) or (B, L, H, D), D even -> the same with its pairs turned by the angles of their places."""
    angle = angles(places, x.shape[-1] // 2, base).to(torch.promote_types(x.dtype, torch.float32))
    if x.ndim == 4:
        angle = angle[..., None, :]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Gate(nn.Module):
    """Each channel's strength goes up and down with the position; the second half of them begins a quarter turn behind the first."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.input = nn.Linear(d_model, d_model, bias=False)
        self.gamma = nn.Parameter(torch.empty(d_model))
        self.phi = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, 0.1)
        with torch.no_grad():
            self.phi.zero_()[(len(self.phi) + 1) // 2 :] = -math.pi / 2

    def strengths(self, places: Tensor) -> Tensor:
        """places (...) -> 1 + gamma cos(t w + phi) (..., D), in float32 at least."""
        D = len(self.gamma)
        phi = self.phi.to(torch.promote_types(self.phi.dtype, torch.float32))
        angle = angles(places, (D + 1) // 2).to(phi.dtype)
        return 1 + self.gamma * torch.cos(torch.cat([angle, angle], -1)[..., :D] + phi)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L, D), in the dtype of x: under autocast, too, what blocks add to is not rounded."""
        return (self.input(x) * self.strengths(places)).to(x.dtype)

    def program(self, p: Program, x: Value, position: Tensor) -> Value:
        """position (B,): of the first token that is fed."""
        return p.multiply(p.linear(self.input, x), p.place(*table(self.strengths, p, position)))


class Rotate(nn.Module):
    """Nothing is learned but W_in."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        if d_model % 2:
            raise ValueError(f"Rotate turns pairs of channels: d_model={d_model} must be even")
        self.input = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """As that of a Gate."""
        return rotated(self.input(x).to(x.dtype), places)

    def program(self, p: Program, x: Value, position: Tensor) -> Value:
        n = x.width // 2

        def waves(places: Tensor) -> Tensor:
            angle = angles(places, n).float()
            return torch.cat([angle.cos(), angle.sin(), -angle.sin()], -1)

        z, y = p.linear(self.input, x), p.value(x.width)
        cos, sin, minus = p.place(*table(waves, p, position)).split(n, n, n)
        (a, b), (first, second) = z.split(n, n), y.split(n, n)
        p.add(p.multiply(a, cos), p.multiply(b, minus), onto=first)
        p.add(p.multiply(b, cos), p.multiply(a, sin), onto=second)
        return y


class Sinusoidal(nn.Module):
    """Fixed waves, as large at the start as a learned table is: at their own size they would drown embeddings drawn from N(0, 0.02^2)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        if d_model % 2:
            raise ValueError(f"Sinusoidal positions are pairs of channels: d_model={d_model} must be even")
        self.d_model = d_model
        self.gain = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gain, 0.02 * math.sqrt(2))

    def waves(self, places: Tensor) -> Tensor:
        """places (...) -> (..., D)"""
        angle = angles(places, self.d_model // 2).to(torch.promote_types(self.gain.dtype, torch.float32))
        return self.gain * torch.cat([angle.sin(), angle.cos()], -1)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """As that of a Gate."""
        return x + self.waves(places).to(x.dtype)

    def program(self, p: Program, x: Value, position: Tensor) -> Value:
        return p.add(x, p.place(*table(self.waves, p, position)))


def table(of: Callable[[Tensor], Tensor], p: Program, position: Tensor) -> tuple[Tensor, int]:
    """What `of` gives for the places that a program meets, a row for each, and the first of these places."""
    first = int(position.min())
    places = torch.arange(first, int(position.max()) + p.room, device=position.device)
    return of(places), first
