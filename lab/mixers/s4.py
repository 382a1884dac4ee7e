"""S4: a state space per channel whose matrix remembers, diagonal plus low rank; as one long convolution.      arXiv:2111.00396

    x' = A x + B u,  y = 2 Re(C . x) + D u,   A = diag(Lambda) - sum_j P_j P_j*,   sampled with step dt by the bilinear rule

B = batch, L = length, D = d_model, n = d_state / 2 conjugate pairs, r = rank of the correction; complex numbers as pairs (..., 2).
State: {"h": (B, D, n, 2)}, float32, or float64 of a layer in float64. With mixing GELU, dropout, Linear(D -> 2D), GLU follow.
Record: eigenvalues Lambda (D, n, 2), dt (D, 1), kernel (1, D, L): y - D u for a unit impulse; bidirectional (2, D, L), the second for the
tokens before it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lab.layers.dplr import Dplr
from lab.layers.hippo import InitMethod, low_rank
from lab.mixers.base import State, at_least_float32
from lab.mixers.state_space import LongConvolution, learn_slowly
from lab.ops.backend import exporting
from lab.ops.program import Program, Value


class S4Layer(LongConvolution):
    """d_state: even, of N real states. init_method: of A and B; legs, legt and fourier are those of HiPPO with their own correction, lin,
    inv and real are diagonal and start with a random one (lab/layers/hippo.py). The other arguments are those of S4DLayer.

    A sequence without a state before or after it is a convolution; with one, and in an exported file, it is the recurrence.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        init_method: InitMethod = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        rate: float = 1.0,
        bidirectional: bool = False,
        dropout: float = 0.0,
        mixing: bool = True,
    ) -> None:
        super().__init__(d_model, dt_min, dt_max, rate, bidirectional, dropout, mixing)
        self.init_method = init_method
        rank, self.n = low_rank(init_method, d_state).P.shape
        self.log_dt = nn.Parameter(torch.empty(d_model))
        self.log_A_re = nn.Parameter(torch.empty(d_model, self.n))  # Lambda = -exp(log_A_re) + i A_im
        self.A_im = nn.Parameter(torch.empty(d_model, self.n))
        self.P = nn.Parameter(torch.empty(rank, d_model, self.n, 2))
        self.B = nn.Parameter(torch.empty(d_model, self.n, 2))
        self.C = nn.Parameter(torch.empty(1 + bidirectional, d_model, self.n, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(d_model, 2 * d_model) if mixing else None
        learn_slowly(self.log_dt, self.log_A_re, self.A_im, self.P, self.B)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        start = low_rank(self.init_method, 2 * self.n)
        with torch.no_grad():
            self.log_A_re.copy_((-start.eigenvalues.real).log().expand_as(self.log_A_re))
            self.A_im.copy_(start.eigenvalues.imag.expand_as(self.A_im))
            self.P.copy_(torch.view_as_real(start.P)[:, None])
            self.B.copy_(torch.view_as_real(start.B))
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.normal_(self.D)

    def continuous(self) -> tuple[Tensor, Tensor]:
        """Lambda (D, n, 2) and dt (D, 1), in float32 at least."""
        Lambda = torch.stack([-at_least_float32(self.log_A_re).exp(), at_least_float32(self.A_im)], -1)
        return Lambda, (self.rate * at_least_float32(self.log_dt).exp())[:, None]

    def discrete(self) -> Dplr:
        Lambda, dt = self.continuous()
        return Dplr(Lambda, at_least_float32(self.P), at_least_float32(self.B), dt)

    def response(self, u: Tensor, h0: Tensor | None, lengths: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor | None]:
        if self.causal and (h0 is not None or wanted or exporting()):
            y, last = self.discrete().scan(u, h0, at_least_float32(self.C[0]), lengths)
            return y + at_least_float32(self.D) * u, last
        return self.convolved(u, self.kernels(u.shape[1]), lengths), None

    def kernels(self, length: int) -> list[Tensor]:
        """(D, length) for each direction: y - D u for a unit impulse."""
        return list(self.discrete().kernels(at_least_float32(self.C), length))

    def program(self, p: Program, x: Value, state: State) -> Value:
        A = self.discrete()
        return self.mixed(p, p.dplr(x, A.d, A.right, A.left, A.b, self.C[0], self.D, state["h"]))

    def record(self, length: int) -> dict[str, Tensor]:
        Lambda, dt = self.continuous()
        return {"eigenvalues": Lambda, "dt": dt, "kernel": torch.stack(self.kernels(length))}
