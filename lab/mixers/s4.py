"""S4: a state space per channel whose matrix remembers, diagonal plus low rank; as one long convolution.      arXiv:2111.00396

    x' = A x + B u,  y = 2 Re(C . x) + D u,   A = diag(Lambda) - sum_j P_j P_j*,   sampled with step dt by the bilinear rule

B = batch, L = length, D = d_model, n = d_state / 2 conjugate pairs, r = rank of the correction; complex numbers as pairs (..., 2).
State: {"h": (B, D, n, 2)}, float32, or float64 of a layer in float64. With mixing GELU, dropout, Linear(D -> 2D), GLU follow.
Record: eigenvalues Lambda (D, n, 2), dt (D, 1), kernel (1, D, L): y - D u for a unit impulse; bidirectional (2, D, L), the second for the
tokens before it.
"""

from __future__ import annotations

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
        rank, n = low_rank(init_method, d_state).P.shape
        super().__init__(d_model, n, dt_min, dt_max, rate, bidirectional, dropout, mixing)
        self.init_method, self.d_state = init_method, d_state
        self.P = nn.Parameter(torch.empty(rank, d_model, n, 2))
        self.B = nn.Parameter(torch.empty(d_model, n, 2))
        learn_slowly(self.P, self.B)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        begin = low_rank(self.init_method, self.d_state)
        self.start(begin.eigenvalues)
        with torch.no_grad():
            self.P.copy_(torch.view_as_real(begin.P)[:, None])
            self.B.copy_(torch.view_as_real(begin.B))

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
