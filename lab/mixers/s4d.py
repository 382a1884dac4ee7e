"""S4D: a diagonal state space per channel, as one long convolution.      arXiv:2206.11893; B = 1, zero-order hold.

    x' = A x + u,  y = 2 Re(C . x) + D u,  sampled with step dt:   h_t = e^{dt A} h_{t-1} + (e^{dt A} - 1)/A u_t

B = batch, L = length, D = d_model, n = d_state / 2 conjugate pairs; complex numbers as pairs (..., 2).
State: {"h": (B, D, n, 2)}, float32, or float64 of a layer in float64. With mixing GELU, dropout, Linear(D -> 2D), GLU follow.
Record: eigenvalues A (D, n, 2), dt (D, 1), kernel (1, D, L): y - D u for a unit impulse; bidirectional (2, D, L), the second for the tokens
before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lab.layers.hippo import InitMethod, eigenvalues
from lab.mixers.base import State, at_least_float32
from lab.mixers.state_space import LongConvolution
from lab.ops import linear_recurrence, ssm_kernel
from lab.ops.backend import exporting
from lab.ops.complex import divide, exp, expm1, multiply
from lab.ops.program import Program, Value

CHUNK = 256  # tokens whose states (B, CHUNK, D, n, 2) a prefill holds at once


class S4DLayer(LongConvolution):
    """d_state: even, of N real states. init_method: of A (lab/layers/hippo.py). dt starts log-uniform in [dt_min, dt_max]. rate: the input
    is sampled `rate` times as coarsely as in training. bidirectional: a second kernel looks back from the end; there is no state then.
    dropout: before the last projection. mixing: False leaves out all that follows y."""

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
        super().__init__(d_model, len(eigenvalues(init_method, d_state)), dt_min, dt_max, rate, bidirectional, dropout, mixing)
        self.init_method, self.d_state = init_method, d_state
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.start(eigenvalues(self.init_method, self.d_state))

    def discrete(self) -> tuple[Tensor, Tensor]:
        """w = dt A, and what a step takes of its input, (e^w - 1) / A; each (D, n, 2)."""
        A, dt = self.continuous()
        w = dt[..., None] * A
        return w, divide(expm1(w), A)

    def response(self, u: Tensor, h0: Tensor | None, lengths: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor | None]:
        (w, b), C, D = self.discrete(), at_least_float32(self.C), at_least_float32(self.D)
        if h0 is not None and u.shape[1] == 1:
            h = multiply(exp(w), h0) + b * u[:, 0, :, None, None]
            y = read(C[0], h)[:, None] + D * u
            return y, h if lengths is None else torch.where((lengths > 0)[:, None, None, None], h, h0)
        y = self.convolved(u, self.kernels(u.shape[1]), lengths)
        if h0 is not None:
            y = y + self.echo(h0, w, C[0], u.shape[1])
        return y, self.last_state(u, w, b, h0, lengths) if wanted else None

    def kernels(self, length: int) -> list[Tensor]:
        """(D, length) for each direction: y - D u for a unit impulse."""
        w, b = self.discrete()
        return [ssm_kernel(w, multiply(C, b), length) for C in at_least_float32(self.C)]

    def record(self, length: int) -> dict[str, Tensor]:
        A, dt = self.continuous()
        return {"eigenvalues": A, "dt": dt, "kernel": torch.stack(self.kernels(length))}

    def echo(self, h0: Tensor, w: Tensor, C: Tensor, length: int) -> Tensor:
        """What the state h0 (B, D, n, 2) adds to the outputs of the next `length` tokens, (B, length, D)."""
        c = multiply(multiply(C, exp(w)), h0)
        K = ssm_kernel(w.expand_as(c).flatten(0, 1), c.flatten(0, 1), length)
        return K.unflatten(0, (-1, w.shape[0])).transpose(1, 2)

    def last_state(self, u: Tensor, w: Tensor, b: Tensor, h: Tensor | None, lengths: Tensor | None) -> Tensor:
        """(B, D, n, 2) after the last real token."""
        if h is None:
            h = u.new_zeros(u.shape[0], *w.shape)
        decay, h = exp(w).flatten(0, 1), h.flatten(1, 2)
        for i, part in enumerate([u] if exporting() else u.split(CHUNK, 1)):
            inputs = (part[..., None, None] * b).flatten(2, 3)
            left = None if lengths is None else (lengths - i * CHUNK).clamp(0, part.shape[1])
            _, h = linear_recurrence(decay, inputs, h, left)
        return h.unflatten(1, w.shape[:2]).clone()  # not a view of the states of a whole chunk

    def program(self, p: Program, x: Value, state: State) -> Value:
        w, b = self.discrete()
        return self.mixed(p, p.state_space(x, exp(w), b, self.C[0], self.D, state["h"]))


def read(C: Tensor, h: Tensor) -> Tensor:
    """C (D, n, 2), h (B, D, n, 2) -> 2 Re(C . h) (B, D)"""
    return 2 * (C[..., 0] * h[..., 0] - C[..., 1] * h[..., 1]).sum(-1)
