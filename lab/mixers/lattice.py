"""Attention whose heads are coupled oscillators on a grid: the mixer of the lattice oscillator transformer (LOT).

B = batch, L = length, S = slots of the cache, D = d_model, H = heads, d = D / H. Each head h has a phase theta_h that moves by Kuramoto
coupling with its neighbours on the grid (`lab.ops.kuramoto_scan`):

    theta_{t+1} = theta_t + dt [omega + u_t + kappa * sum_j w_hj sin(theta_j - theta_h)],   w_hj = exp(-distance)

phase_mode says how it enters the scores:
    wave     a phase per token, driven by u = W_u x; score bias alpha_h cos(theta_h(t) - theta_h(s))
    gain     n_steps from theta0, u = 0, the same for all tokens; scores times 1 + alpha_h cos theta_h
    literal  the same phases; score bias alpha_h cos theta_h, which the softmax cancels: the null control, equal to plain attention

State: the cache of attention, k (B, S, H, d + 2) (gain: d), v (B, S, H, d), length (B,); wave adds theta (B, H), after the drive of the
last real token. Losses, unweighted: sync = mean of 1 - r over real tokens, r = |mean_h exp(i theta_h)|;
diversity = exp(-Var_h(omega) / sigma0^2), sigma0^2 the variance of the uniform law omega starts from.
Record: theta (B, L, H), sync_order r (B, L), omega (H,), kappa (H,), and the attention weights (B, H, L, S), phases included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lab.mixers.attention import Attention, cached_attention, empty_cache
from lab.mixers.base import Output, State
from lab.ops import kuramoto_scan
from lab.ops.program import NOTHING, Program, Value

Neighborhood = Literal["moore", "von_neumann"]
Boundary = Literal["open", "periodic"]


class Lattice(Attention):
    """lattice_shape: rows and columns with product n_heads; None: the most square. init_freq_range (of omega), coupling (kappa) and alpha
    are where learnable parameters start. n_steps acts in gain and literal. drive acts in wave; without it the phases depend on the
    position alone. dropout acts on the attention weights."""

    loss_names = ("sync", "diversity")

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        lattice_shape: list[int] | tuple[int, int] | None = None,
        neighborhood: Neighborhood = "moore",
        boundary: Boundary = "open",
        phase_mode: Literal["wave", "gain", "literal"] = "wave",
        dt: float = 0.1,
        n_steps: int = 8,
        init_freq_range: list[float] | tuple[float, float] = (0.9, 1.1),
        coupling: float = 0.1,
        alpha: float = 0.1,
        drive: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(d_model, n_heads, dropout)
        if phase_mode not in ("wave", "gain", "literal"):
            raise ValueError(f"Lattice: phase_mode={phase_mode!r}; expected wave, gain or literal")
        if len(init_freq_range) != 2 or not init_freq_range[0] < init_freq_range[1]:
            raise ValueError(f"Lattice: init_freq_range={list(init_freq_range)}; expected [low, high] with low < high")
        shape = most_square(n_heads) if lattice_shape is None else tuple(lattice_shape)
        if len(shape) != 2 or min(shape) < 1 or shape[0] * shape[1] != n_heads:
            raise ValueError(f"Lattice: lattice_shape={list(shape)} must be two sides whose product is n_heads={n_heads}")
        self.phase_mode = phase_mode
        self.dt = dt
        self.n_steps = n_steps
        self.low, self.high = init_freq_range
        self.init_coupling = coupling
        self.init_alpha = alpha
        self.omega = nn.Parameter(torch.empty(n_heads))
        self.kappa = nn.Parameter(torch.empty(n_heads))
        self.alpha = nn.Parameter(torch.empty(n_heads))
        self.drive = nn.Linear(d_model, n_heads, bias=False) if phase_mode == "wave" and drive else None  # omega is its bias
        self.register_buffer("theta0", torch.empty(n_heads))
        self.register_buffer("W", neighbour_weights(shape, neighborhood, boundary), persistent=False)
        self.reset_parameters()

    theta0: Tensor
    W: Tensor

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.theta0, 0, 2 * math.pi)  # equal phases would be a stationary point of the order parameter
        nn.init.uniform_(self.omega, self.low, self.high)
        nn.init.constant_(self.kappa, self.init_coupling)
        nn.init.constant_(self.alpha, self.init_alpha)
        if self.drive is not None:
            nn.init.normal_(self.drive.weight, std=0.02)

    def mix(self, x: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...], mask: Tensor | None = None) -> Output:
        pattern = self.pattern(x, state, mask)
        theta, last = self.phases(x, state, lengths)
        q, k, v = self.heads(x)
        q, k = self.imprint(q, k, theta)
        y, cache, record = cached_attention(q, k, v, state, lengths, want, self.dropout if self.training else 0.0, pattern)
        if cache is not None and self.phase_mode == "wave":
            cache["theta"] = last.expand(x.shape[0], -1)
        losses = self.losses(theta, lengths, x.shape[1]) if "losses" in want else {}
        if "record" in want:
            theta = theta.expand(x.shape[0], x.shape[1], -1)
            record |= {"theta": theta, "sync_order": order_parameter(theta), "omega": self.omega, "kappa": self.kappa}
        return Output(self.o(y.flatten(-2)), cache, losses, record)

    def phases(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, L, D) -> theta (B, L, H) at each token, before its drive, and (B, H) after the last one.

        Sizes are 1 where rows or tokens do not differ: phases that do not depend on the content are computed once, not per row.
        """
        oscillators = (self.omega, self.kappa, self.W, self.dt)
        if self.phase_mode != "wave":
            _, theta = kuramoto_scan(self.theta0, self.omega.new_zeros(1, self.n_steps, self.n_heads), *oscillators)
            return theta[:, None], theta
        if self.drive is not None:
            drive = self.drive(x)
        else:
            drive = self.omega.new_zeros(1 if state is None else x.shape[0], x.shape[1], self.n_heads)
        return kuramoto_scan(self.theta0 if state is None else state["theta"], drive, *oscillators, lengths)

    def imprint(self, q: Tensor, k: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """q, k (B, L, H, d) -> the same with the phases: the bias of rank 2 (literal: 1) as two more columns, exact and without an
        (L, L) tensor; gain scales q. Rounder head sizes (36 to 64) are slower: scripts/bench_training.py --attention 1024."""
        alpha = self.alpha[:, None]
        if self.phase_mode == "gain":
            return q * (1 + alpha * theta.cos()[..., None]).to(q.dtype), k
        if self.phase_mode == "wave":
            wave = torch.stack([theta.cos(), theta.sin()], -1)
            return append(q, alpha * wave), append(k, wave)
        cos = theta.cos()[..., None]
        zero, one = torch.zeros_like(cos), torch.ones_like(cos)
        return append(q, torch.cat([alpha * cos, zero], -1)), append(k, torch.cat([one, zero], -1))

    def losses(self, theta: Tensor, lengths: Tensor | None, length: int) -> dict[str, Tensor]:
        r = order_parameter(theta)  # (B or 1, L or 1)
        if lengths is not None:
            real = torch.arange(length, device=r.device) < lengths.to(r.device)[:, None]  # (B, L)
            r = torch.where(real, r, 0).sum() / real.sum()
        spread = self.omega.var(correction=0) / ((self.high - self.low) ** 2 / 12)
        return {"sync": 1 - r.mean(), "diversity": torch.exp(-spread)}

    def init_state(self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        columns = 0 if self.phase_mode == "gain" else 2
        state = empty_cache(batch_size, self.n_heads, self.d_head + columns, self.d_head, self.q.weight, device, dtype)
        if self.phase_mode == "wave":
            state["theta"] = self.theta0.to(state["k"].device).repeat(batch_size, 1)  # a copy: the buffer stays the model's
        return state

    def program(self, p: Program, x: Value, state: State) -> Value:
        q, k, v = (p.linear(layer, x) for layer in (self.q, self.k, self.v))
        keys, columns = state["k"], (NOTHING, NOTHING)
        if self.phase_mode == "gain":
            gain = 1 + self.alpha * self.phases(self.theta0, None, None)[1][0].cos()
            q = p.multiply(q, p.constant(gain.repeat_interleave(self.d_head)))
        elif self.phase_mode == "literal":
            keys = keys[..., : self.d_head]  # the softmax cancels what the other columns add
        else:
            u = p.linear(self.drive, x) if self.drive is not None else NOTHING
            pull = self.dt * self.kappa[:, None] * self.W
            columns = p.oscillate(u, state["theta"], self.alpha, self.dt * self.omega, pull, self.dt)
        return p.linear(self.o, p.attend(q, k, v, keys, state["v"], self.d_head**-0.5, *columns))

    def derived_metrics(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"sync_order": 1 - losses["sync"]}


def append(x: Tensor, columns: Tensor) -> Tensor:
    """x (B, L, H, d), columns (B or 1, L or 1, H, 2) -> (B, L, H, d + 2) in the dtype of x"""
    return torch.cat([x, columns.to(x.dtype).expand(*x.shape[:-1], 2)], -1)


def order_parameter(theta: Tensor) -> Tensor:
    """theta (..., H) -> r (...) in [0, 1], r e^{i psi} = mean_h e^{i theta_h}. The norm has gradient 0, not NaN, at r = 0."""
    return torch.linalg.vector_norm(torch.stack([theta.cos().mean(-1), theta.sin().mean(-1)], -1), dim=-1)


def most_square(n: int) -> tuple[int, int]:
    """The factors of n nearest to each other, the smaller first: 8 -> (2, 4)."""
    rows = next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    return rows, n // rows


def neighbour_weights(shape: tuple[int, ...], neighborhood: Neighborhood, boundary: Boundary) -> Tensor:
    """(H, H): exp(-1) for the four neighbours, exp(-sqrt 2) for the diagonal ones of "moore", else 0; heads are numbered row by row.

    On a periodic side of length 1 or 2 a neighbour is met several times; it counts once, at its smallest distance, and a head is
    never its own neighbour.
    """
    if neighborhood not in ("moore", "von_neumann"):
        raise ValueError(f"Lattice: neighborhood={neighborhood!r}; expected moore or von_neumann")
    if boundary not in ("open", "periodic"):
        raise ValueError(f"Lattice: boundary={boundary!r}; expected open or periodic")
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1).reshape(-1, 2)  # (H, 2)
    gap = (place[:, None] - place[None]).abs()  # (H, H, 2)
    if boundary == "periodic":
        gap = torch.minimum(gap, torch.tensor(shape) - gap)
    near = (gap.amax(-1) == 1) & ((gap.sum(-1) == 1) | (neighborhood == "moore"))
    return torch.exp(-gap.double().norm(dim=-1)).where(near, 0.0).float()
