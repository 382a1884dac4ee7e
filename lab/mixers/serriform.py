"""Serriform: a dilated causal convolution, a memory of constant decays on some of the channels, a gated fusion and a low-rank layer.

    c_t = act(W_p (sum_k w_k x_{t - (K - 1 - k) dilation}) + b_p)                       conv branch, a filter of K taps per channel
    h_t = alpha h_{t-1} + beta c_t on the first M channels, r = (h, the rest of c)      sparse recurrence, alpha = exp(-softplus(rho))
    f = r + sigmoid(W_1 r + b_1) * tanh(W_2 r + b_2)                                    gated fusion
    y = W_up act(W_down f + b_down) + b_up                                              low-rank layer, D -> D / ff_reduction_factor -> D

A part that is switched off is left out. topology: sequential is the above; in parallel the recurrence reads x, and the two are added,
r = c + (h, the rest of x). The dilation of layer i is int(growth^(i mod period)): teeth of a saw, as far as the layers are deep.
B = batch, L = length, D = d_model, K = conv_kernel_size, M = D / memory_dim_factor, T = (K - 1) dilation.
State: {"conv": (B, T, D), the last T inputs, "h": (B, M)}, float32, or float64 of a layer in float64; what is switched off has none.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.layers.activation import ACTIVATIONS, Activation, check_activation
from lab.mixers.base import Mixer, Output, State, at_least_float32, check_at_least, state_type
from lab.ops import causal_conv, linear_recurrence
from lab.ops.program import Program, Value, without_dropout

HALF_LIVES = 1.0, 1024.0  # tokens, of the first and the last channel that remembers, before training


class Serriform(Mixer):
    """conv_dilation_growth, conv_dilation_period: of the dilation over the layers; layer: the number of this one, which the stack knows.
    activation: of the conv branch and of the low-rank layer; None is SiLU in the one and GELU in the other. dropout: behind both.
    allow_no_time_mixing: without it, use_conv and use_recurrence cannot both be off."""

    def __init__(
        self,
        d_model: int,
        use_conv: bool = True,
        use_recurrence: bool = True,
        use_lowrank_ff: bool = True,
        topology: Literal["sequential", "parallel"] = "sequential",
        conv_kernel_size: int = 3,
        conv_dilation_growth: float = 2.0,
        conv_dilation_period: int = 3,
        memory_dim_factor: int = 4,
        ff_reduction_factor: int = 4,
        activation: Activation | None = None,
        dropout: float = 0.0,
        allow_no_time_mixing: bool = False,
        layer: int = 0,
    ) -> None:
        super().__init__()
        check_at_least("Serriform", 1, d_model=d_model, conv_kernel_size=conv_kernel_size, conv_dilation_period=conv_dilation_period)
        check_at_least("Serriform", 1, memory_dim_factor=memory_dim_factor, ff_reduction_factor=ff_reduction_factor)
        check_at_least("Serriform", 0, layer=layer)
        if not isinstance(conv_dilation_growth, int | float) or not 1 <= conv_dilation_growth < math.inf:
            raise ValueError(f"Serriform: conv_dilation_growth={conv_dilation_growth!r} must be a number of at least 1")
        if topology not in ("sequential", "parallel"):
            raise ValueError(f"Serriform: topology={topology!r}; expected sequential or parallel")
        if activation is not None:
            check_activation("Serriform", activation)
        if not (use_conv or use_recurrence or allow_no_time_mixing):
            raise ValueError(
                "Serriform: use_conv and use_recurrence are both off, so nothing is mixed over time; allow_no_time_mixing=True permits it"
            )
        for name, factor in (("memory_dim_factor", memory_dim_factor), ("ff_reduction_factor", ff_reduction_factor)):
            if factor > d_model:
                raise ValueError(f"Serriform: {name}={factor} leaves none of the d_model={d_model} channels")
        self.d_model, self.topology = d_model, topology
        self.dilation = int(conv_dilation_growth ** (layer % conv_dilation_period))
        self.activations = activation or "silu", activation or "gelu"  # of the conv branch, of the low-rank layer
        self.taps = nn.Parameter(torch.empty(conv_kernel_size, d_model)) if use_conv else None
        self.pointwise = nn.Linear(d_model, d_model) if use_conv else None
        M = d_model // memory_dim_factor
        self.rho = nn.Parameter(torch.empty(M)) if use_recurrence else None
        self.beta = nn.Parameter(torch.empty(M)) if use_recurrence else None
        self.fusion = nn.Linear(d_model, 2 * d_model)  # W_1, W_2
        self.down = nn.Linear(d_model, d_model // ff_reduction_factor) if use_lowrank_ff else None
        self.up = nn.Linear(d_model // ff_reduction_factor, d_model) if use_lowrank_ff else None
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.taps is not None:
            nn.init.uniform_(self.taps, -(len(self.taps) ** -0.5), len(self.taps) ** -0.5)
        if self.rho is not None and self.beta is not None:
            shortest, longest = (math.log10(n) for n in HALF_LIVES)
            rate = math.log(2) / torch.logspace(shortest, longest, len(self.rho), dtype=torch.float64)
            with torch.no_grad():
                self.rho.copy_(torch.log(torch.expm1(rate)))  # softplus of it is the rate
                self.beta.copy_((-torch.expm1(-2 * rate)).sqrt())  # sqrt(1 - alpha^2): white noise keeps its variance

    def extra_repr(self) -> str:
        mixes = "" if self.taps is not None or self.rho is not None else ", mixes nothing over time"
        return f"{self.topology}, dilation={self.dilation}, activations={', '.join(self.activations)}{mixes}"

    @property
    def reach(self) -> int:
        """T, how many tokens before a token its convolution sees."""
        return 0 if self.taps is None else (len(self.taps) - 1) * self.dilation

    @property
    def half_lives(self) -> Tensor | None:
        """(M,) tokens until a channel of the recurrence has forgotten half; None without one."""
        return None if self.rho is None else math.log(2) / F.softplus(at_least_float32(self.rho.detach()))

    @property
    def time_step_bias(self) -> nn.Parameter | None:
        return self.rho

    def decay(self) -> Tensor:
        assert self.rho is not None
        return torch.exp(-F.softplus(at_least_float32(self.rho)))

    def mix(self, x: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        conv, feed = (ACTIVATIONS[name] for name in self.activations)
        after, y = {}, x
        if self.taps is not None and self.pointwise is not None:
            before = None if state is None else state["conv"]
            y, after["conv"] = causal_conv(x, self.taps, dilation=self.dilation, state=before, lengths=lengths)
            y = self.dropout(conv(self.pointwise(y)))
        if self.rho is not None:
            before = None if state is None else state["h"]
            both = self.topology == "parallel" and self.taps is not None
            r, after["h"] = self.recur(x if both else y, before, lengths)
            y = y + r if both else r
        a, b = self.fusion(y).chunk(2, -1)
        y = y + torch.sigmoid(a) * torch.tanh(b)
        if self.down is not None and self.up is not None:
            y = self.up(self.dropout(feed(self.down(y))))
        return Output(y, after)

    def recur(self, x: Tensor, h: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, L, D), h (B, M) -> the same with its first M channels replaced by their memory, and the last h."""
        assert self.beta is not None
        M = len(self.beta)
        h, last = linear_recurrence(self.decay(), x[..., :M] * at_least_float32(self.beta), h, lengths)
        return torch.cat([h.to(x.dtype), x[..., M:]], -1), last.clone()  # not a view of all of h

    def init_state(self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        like = self.fusion.weight
        place, kind = device or like.device, state_type(dtype or like.dtype)
        state = {}
        if self.taps is not None:
            state["conv"] = torch.zeros(batch_size, self.reach, like.shape[1], device=place, dtype=kind)
        if self.rho is not None:
            state["h"] = torch.zeros(batch_size, len(self.rho), device=place, dtype=kind)
        return state

    def program(self, p: Program, x: Value, state: State) -> Value:
        without_dropout(self.dropout)
        y = x
        if self.taps is not None and self.pointwise is not None:
            y = p.linear(self.pointwise, p.conv(x, self.taps, None, state["conv"], self.dilation))
            y = p.apply(self.activations[0], y)
        if self.rho is not None and self.beta is not None:
            both, M = self.topology == "parallel" and self.taps is not None, len(self.rho)
            r = p.multiply(x if both else y, p.constant(F.pad(self.beta, (0, x.width - M), value=1.0)))  # the others pass
            h = p.state(state["h"])
            kept = p.multiply(h, p.constant(self.decay()))
            for place in (h, r.part(0, M)):
                p.add(kept, r.part(0, M), onto=place)
            y = p.add(y, r) if both else r
        a, b = p.linear(self.fusion, y).split(x.width, x.width)
        y = p.add(y, p.multiply(p.apply("sigmoid", a), p.apply("tanh", b)))
        if self.down is not None and self.up is not None:
            y = p.linear(self.up, p.apply(self.activations[1], p.linear(self.down, y)))
        return y
