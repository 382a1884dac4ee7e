"""S5: one state space for all channels, by a scan.      arXiv:2208.04933

    h_t = e^{dt A} h_{t-1} + (e^{dt A} - 1)/A (B~ u_t),   y_t = 2 Re(C~ h_t) + D u_t,   with mixing g * sigmoid(W g), g = GELU(y)

B = batch, L = length, D = d_model, P = d_state / 2 conjugate pairs of `blocks` blocks of HiPPO-LegS; complex numbers as pairs (..., 2).
State: {"h": (B, P, 2)}, float32, or float64 of a layer in float64.
Record: eigenvalues A (1, P, 2), dt (1, P), kernel (1, D, L): y - D u of channel d for a unit impulse in channel d alone; bidirectional
(2, D, L), the second for the tokens before it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lab.layers.hippo import InitMethod, diagonalise, eigenvalues
from lab.mixers.base import State, at_least_float32, check_at_least
from lab.mixers.state_space import StateSpace, learn_slowly, reversed_rows
from lab.ops import linear_recurrence, ssm_kernel
from lab.ops.complex import divide, exp, expm1, multiply
from lab.ops.program import Program, Value


class S5Layer(StateSpace):
    """d_state: even in each of the `blocks`. The other arguments are those of S4DLayer."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        blocks: int = 1,
        init_method: InitMethod = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        rate: float = 1.0,
        bidirectional: bool = False,
        mixing: bool = True,
    ) -> None:
        super().__init__(d_model, dt_min, dt_max, rate, bidirectional, mixing)
        check_at_least("S5Layer", 1, d_state=d_state, blocks=blocks)
        if d_state % (2 * blocks):
            raise ValueError(f"S5Layer: d_state={d_state} must be a multiple of 2 blocks={2 * blocks}")
        self.d_state, self.blocks, self.init_method = d_state, blocks, init_method
        P = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(P))
        self.log_A_re = nn.Parameter(torch.empty(P))  # A = -exp(log_A_re) + i A_im
        self.A_im = nn.Parameter(torch.empty(P))
        self.B = nn.Parameter(torch.empty(P, d_model, 2))
        self.C = nn.Parameter(torch.empty(1 + bidirectional, d_model, P, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.gate = nn.Linear(d_model, d_model) if mixing else None
        learn_slowly(self.log_dt, self.log_A_re, self.A_im, self.B)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        size, D = self.d_state // self.blocks, len(self.D)
        A = eigenvalues(self.init_method, size).repeat(self.blocks)
        V = diagonalise("legs", size).V  # real matrices of unit scale, seen in the eigenvectors' coordinates
        B = torch.randn(self.blocks, size, D, dtype=torch.float64) / math.sqrt(D)
        C = torch.randn(len(self.C), self.blocks, D, size, dtype=torch.float64) / math.sqrt(self.d_state)
        with torch.no_grad():
            self.log_A_re.copy_((-A.real).log())
            self.A_im.copy_(A.imag)
            self.B.copy_(torch.view_as_real((V.mH @ B.to(V.dtype)).flatten(0, 1)))
            self.C.copy_(torch.view_as_real((C.to(V.dtype) @ V).transpose(1, 2).flatten(2, 3)))
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        nn.init.normal_(self.D)

    def response(self, u: Tensor, h0: Tensor | None, lengths: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor | None]:
        C, D = at_least_float32(self.C), at_least_float32(self.D)
        y, last = self.scan(u, C[0], h0, lengths)
        if self.bidirectional:
            y = y + reversed_rows(self.scan(reversed_rows(u, lengths), C[1], None, None)[0], lengths)
        return y + D * u, last.clone() if wanted else None  # not a view of all states

    def mix_channels(self, g: Tensor) -> Tensor:
        assert self.gate is not None
        return g * torch.sigmoid(self.gate(g))

    def scan(self, u: Tensor, C: Tensor, h0: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """u (B, L, D) -> 2 Re(C h) (B, L, D), the last state (B, P, 2)"""
        w, b = self.discrete()
        B = at_least_float32(self.B)
        inputs = torch.stack([u @ B[..., 0].T, u @ B[..., 1].T], -1)  # (B, L, P, 2)
        h, last = linear_recurrence(exp(w), multiply(b, inputs), h0, lengths)
        return 2 * (h[..., 0] @ C[..., 0].T - h[..., 1] @ C[..., 1].T), last

    def continuous(self) -> tuple[Tensor, Tensor]:
        """A (P, 2) and dt (P,), in float32 at least."""
        A = torch.stack([-at_least_float32(self.log_A_re).exp().clamp(min=1e-4), at_least_float32(self.A_im)], -1)
        return A, self.rate * at_least_float32(self.log_dt).exp()

    def discrete(self) -> tuple[Tensor, Tensor]:
        """w = dt A, and what a step takes of B u, (e^w - 1) / A; each (P, 2)."""
        A, dt = self.continuous()
        w = dt[:, None] * A
        return w, divide(expm1(w), A)

    def record(self, length: int) -> dict[str, Tensor]:
        (A, dt), (w, b) = self.continuous(), self.discrete()
        into = multiply(b, at_least_float32(self.B).transpose(0, 1))  # (D, P, 2)
        kernel = torch.stack([ssm_kernel(w.expand_as(into), multiply(C, into), length) for C in at_least_float32(self.C)])
        return {"eigenvalues": A[None], "dt": dt[None], "kernel": kernel}

    def program(self, p: Program, x: Value, state: State) -> Value:
        w, b = self.discrete()
        into = multiply(b[:, None], self.B)  # (P, D, 2)
        h = p.rotate(p.linear(torch.cat([into[..., 0], into[..., 1]]), x), exp(w), state["h"])
        y = p.linear(2 * torch.cat([self.C[0, ..., 0], -self.C[0, ..., 1]], 1), h)
        y = p.add(y, p.multiply(x, p.constant(self.D)))
        if self.gate is None:
            return y
        g = p.apply("gelu", y)
        return p.multiply(g, p.apply("sigmoid", p.linear(self.gate, g)))
