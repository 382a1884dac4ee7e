"""What S4, S4D and S5 share: a linear, time-invariant state space x' = A x + B u, y = C x + D u, sampled with step dt.

    y = SSM(u) + D u, in float32 at least;   with mixing, what mixes the channels follows: f(GELU(y))

B = batch, L = length, D = d_model, n = d_state / 2 conjugate pairs; complex numbers as pairs (..., 2).
State: {"h": (B, .., n, 2)}, float32, or float64 of a layer in float64.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.mixers.base import Mixer, Output, State, at_least_float32, check_at_least, check_time_steps, state_type
from lab.ops import fft_conv
from lab.ops.program import Program, Value


class StateSpace(Mixer):
    """rate: the input is sampled `rate` times as coarsely as in training. bidirectional: a second state space looks back from the end;
    there is no state then. mixing: False leaves the state space alone, y = SSM(u) + D u of every channel."""

    log_dt: nn.Parameter
    A_im: nn.Parameter  # (.., n)
    D: nn.Parameter  # (D,)

    def __init__(self, d_model: int, dt_min: float, dt_max: float, rate: float, bidirectional: bool, mixing: bool) -> None:
        super().__init__()
        check_at_least(type(self).__name__, 1, d_model=d_model)
        check_time_steps(type(self).__name__, dt_min, dt_max, rate)
        self.d_model, self.dt_min, self.dt_max, self.rate = d_model, dt_min, dt_max, rate
        self.bidirectional, self.mixing = bidirectional, mixing
        self.causal = not bidirectional

    def mix(self, x: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        h0 = None if state is None else state["h"]
        y, last = self.response(at_least_float32(x), h0, lengths, "state" in want)
        y = self.mix_channels(F.gelu(y).to(x.dtype)) if self.mixing else y.to(x.dtype)
        return Output(y, {"h": last}, record=self.record(x.shape[1]) if "record" in want else {})

    @abstractmethod
    def response(self, u: Tensor, h0: Tensor | None, lengths: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """u (B, L, D) in float32 at least, the state before it -> SSM(u) + D u (B, L, D), the state after it if it is wanted."""

    @abstractmethod
    def mix_channels(self, g: Tensor) -> Tensor:
        """GELU(y) (B, L, D) -> (B, L, D)"""

    @abstractmethod
    def record(self, length: int) -> dict[str, Tensor]:
        """Eigenvalues, dt, and the kernel of so many tokens."""

    @property
    def time_step_bias(self) -> nn.Parameter:
        return self.log_dt

    def init_state(self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        self.check_causal()
        return {"h": torch.zeros(batch_size, *self.A_im.shape, 2, device=device or self.D.device, dtype=state_type(dtype or self.D.dtype))}


class LongConvolution(StateSpace):
    """A state space of n pairs per channel, computed as one convolution as long as the sequence. Mixing: dropout, Linear(D -> 2D), GLU."""

    def __init__(
        self, d_model: int, n: int, dt_min: float, dt_max: float, rate: float, bidirectional: bool, dropout: float, mixing: bool
    ) -> None:
        super().__init__(d_model, dt_min, dt_max, rate, bidirectional, mixing)
        if dropout and not mixing:
            raise ValueError(f"{type(self).__name__}: dropout={dropout} belongs to the mixing, which mixing=False leaves out; it must be 0")
        self.log_dt = nn.Parameter(torch.empty(d_model))
        self.log_A_re = nn.Parameter(torch.empty(d_model, n))  # the diagonal is -exp(log_A_re) + i A_im
        self.A_im = nn.Parameter(torch.empty(d_model, n))
        self.C = nn.Parameter(torch.empty(1 + bidirectional, d_model, n, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(d_model, 2 * d_model) if mixing else None
        learn_slowly(self.log_dt, self.log_A_re, self.A_im)

    def start(self, diagonal: Tensor) -> None:
        """Draws the parameters anew; diagonal (n,) complex."""
        with torch.no_grad():
            self.log_A_re.copy_((-diagonal.real).log().expand_as(self.log_A_re))
            self.A_im.copy_(diagonal.imag.expand_as(self.A_im))
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.normal_(self.D)

    def continuous(self) -> tuple[Tensor, Tensor]:
        """The diagonal (D, n, 2) and dt (D, 1), in float32 at least."""
        diagonal = torch.stack([-at_least_float32(self.log_A_re).exp(), at_least_float32(self.A_im)], -1)
        return diagonal, (self.rate * at_least_float32(self.log_dt).exp())[:, None]

    def convolved(self, u: Tensor, kernels: Sequence[Tensor], lengths: Tensor | None) -> Tensor:
        """u (B, L, D), a kernel (D, L) for each direction -> SSM(u) + D u (B, L, D)"""
        y = fft_conv(u, kernels[0], at_least_float32(self.D))
        if self.bidirectional:
            y = y + reversed_rows(fft_conv(reversed_rows(u, lengths), kernels[1]), lengths)
        return y

    def mix_channels(self, g: Tensor) -> Tensor:
        assert self.out is not None
        return F.glu(self.out(self.dropout(g)))

    def mixed(self, p: Program, y: Value) -> Value:
        """What follows y in a program."""
        if self.out is None:
            return y
        value, gate = p.linear(self.out, p.apply("gelu", y)).split(y.width, y.width)
        return p.multiply(value, p.apply("sigmoid", gate))


def learn_slowly(*parameters: nn.Parameter) -> None:
    """No weight decay, and a learning rate of 1e-3 at most (lab/training/optimizer.py)."""
    for parameter in parameters:
        parameter._optim = {"weight_decay": 0.0, "lr": 1e-3}  # type: ignore[attr-defined]


def reversed_rows(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, L, D) with the real tokens of each row in reverse order, and zeros behind them."""
    if lengths is None:
        return x.flip(1)
    place = lengths.to(x.device)[:, None] - 1 - torch.arange(x.shape[1], device=x.device)
    return torch.where((place >= 0)[..., None], x.gather(1, place.clamp(min=0)[..., None].expand_as(x)), 0)
