"""S4D: a diagonal state space per channel, as one long convolution.      arXiv:2206.11893; B = 1, zero-order hold.

    x' = A x + u,  y = 2 Re(C . x) + D u,  sampled with step dt:   h_t = e^{dt A} h_{t-1} + (e^{dt A} - 1)/A u_t

B = batch, L = length, D = d_model, n = d_state / 2 conjugate pairs; complex numbers as pairs (..., 2).
State: {"h": (B, D, n, 2)}, float32, or float64 of a layer in float64. Then GELU, dropout, Linear(D -> 2D), GLU.
Record: eigenvalues A (D, n, 2), dt (D, 1), kernel (1, D, L): y - D u for a unit impulse; bidirectional (2, D, L), the second for the tokens
before it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.layers.hippo import InitMethod, eigenvalues
from lab.mixers.base import Mixer, Output, State, at_least_float32, check_at_least, check_time_steps, state_type
from lab.ops import fft_conv, linear_recurrence, ssm_kernel
from lab.ops.backend import exporting
from lab.ops.complex import divide, exp, expm1, multiply
from lab.ops.program import Program, Value

CHUNK = 256  # tokens whose states (B, CHUNK, D, n, 2) a prefill holds at once


class S4DLayer(Mixer):
    """d_state: even, of N real states. init_method: of A (lab/layers/hippo.py). dt starts log-uniform in [dt_min, dt_max]. rate: the input
    is sampled `rate` times as coarsely as in training. bidirectional: a second kernel looks back from the end; there is no state then."""

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
    ) -> None:
        super().__init__()
        check_at_least("S4DLayer", 1, d_model=d_model)
        check_time_steps("S4DLayer", dt_min, dt_max, rate)
        self.init_method, self.dt_min, self.dt_max, self.rate, self.bidirectional = init_method, dt_min, dt_max, rate, bidirectional
        self.causal = not bidirectional
        self.n = len(eigenvalues(init_method, d_state))
        self.log_dt = nn.Parameter(torch.empty(d_model))
        self.log_A_re = nn.Parameter(torch.empty(d_model, self.n))  # A = -exp(log_A_re) + i A_im
        self.A_im = nn.Parameter(torch.empty(d_model, self.n))
        self.C = nn.Parameter(torch.empty(1 + bidirectional, d_model, self.n, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(d_model, 2 * d_model)
        for parameter in (self.log_dt, self.log_A_re, self.A_im):
            parameter._optim = {"weight_decay": 0.0, "lr": 1e-3}  # type: ignore[attr-defined]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        A = eigenvalues(self.init_method, 2 * self.n)
        with torch.no_grad():
            self.log_A_re.copy_((-A.real).log().expand_as(self.log_A_re))
            self.A_im.copy_(A.imag.expand_as(self.A_im))
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.normal_(self.D)

    def continuous(self) -> tuple[Tensor, Tensor]:
        """A (D, n, 2) and dt (D, 1), in float32 at least."""
        A = torch.stack([-at_least_float32(self.log_A_re).exp(), at_least_float32(self.A_im)], -1)
        return A, (self.rate * at_least_float32(self.log_dt).exp())[:, None]

    def discrete(self) -> tuple[Tensor, Tensor]:
        """w = dt A, and what a step takes of its input, (e^w - 1) / A; each (D, n, 2)."""
        A, dt = self.continuous()
        w = dt[..., None] * A
        return w, divide(expm1(w), A)

    def mix(self, x: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        w, b = self.discrete()
        u, C, D = (at_least_float32(t) for t in (x, self.C, self.D))
        h0 = None if state is None else state["h"]
        after: State = None
        if h0 is not None and x.shape[1] == 1:
            h = multiply(exp(w), h0) + b * u[:, 0, :, None, None]
            y = read(C[0], h)[:, None] + D * u
            after = {"h": h if lengths is None else torch.where((lengths > 0)[:, None, None, None], h, h0)}
        else:
            y = fft_conv(u, ssm_kernel(w, multiply(C[0], b), x.shape[1]), D)
            if h0 is not None:
                y = y + self.echo(h0, w, C[0], x.shape[1])
            if self.bidirectional:
                backwards = reversed_rows(u, lengths)
                y = y + reversed_rows(fft_conv(backwards, ssm_kernel(w, multiply(C[1], b), x.shape[1])), lengths)
            if "state" in want:
                after = {"h": self.last_state(u, w, b, h0, lengths)}
        y = self.out(self.dropout(F.gelu(y)).to(x.dtype))
        return Output(F.glu(y), after, record=self.record(x.shape[1]) if "record" in want else {})

    def record(self, length: int) -> dict[str, Tensor]:
        (A, dt), (w, b) = self.continuous(), self.discrete()
        return {
            "eigenvalues": A,
            "dt": dt,
            "kernel": torch.stack([ssm_kernel(w, multiply(C, b), length) for C in at_least_float32(self.C)]),
        }

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
        y = p.apply("gelu", p.state_space(x, exp(w), b, self.C[0], self.D, state["h"]))
        value, gate = p.linear(self.out, y).split(x.width, x.width)
        return p.multiply(value, p.apply("sigmoid", gate))

    @property
    def time_step_bias(self) -> nn.Parameter:
        return self.log_dt

    def init_state(self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        self.check_causal()
        return {"h": torch.zeros(batch_size, *self.A_im.shape, 2, device=device or self.D.device, dtype=state_type(dtype or self.D.dtype))}


def read(C: Tensor, h: Tensor) -> Tensor:
    """C (D, n, 2), h (B, D, n, 2) -> 2 Re(C . h) (B, D)"""
    return 2 * (C[..., 0] * h[..., 0] - C[..., 1] * h[..., 1]).sum(-1)


def reversed_rows(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, L, D) with the real tokens of each row in reverse order, and zeros behind them."""
    if lengths is None:
        return x.flip(1)
    place = lengths.to(x.device)[:, None] - 1 - torch.arange(x.shape[1], device=x.device)
    return torch.where((place >= 0)[..., None], x.gather(1, place.clamp(min=0)[..., None].expand_as(x)), 0)
