"""Geometric Drift Field: complex channels that decay and turn, both by how much the input says. The mixer of LaminarNet.

    u = SiLU(causal depthwise conv_K(x));   theta, delta, v, g = split(W u)           local mixing
    dt = softplus(delta + b);   a = exp(-dt + i theta_max tanh(theta))               gated retention, phase clipping
    h_t = a_t h_{t-1} + (1 - |a_t|) v_t                                              state (B, m), complex
    y_t = W_o (M h_t * sigmoid(g_t))                                                 M mixes heads of the readout

B = batch, L = length, D = d_model, m = D / 2 complex channels, H = heads of m / H channels, c mod H the head of channel c, K = conv_kernel. Complex
numbers are pairs side by side: h_t is read as D real numbers. All of it but W, W_o and the convolution is float32, also under autocast.
State: {"conv": (B, K - 1, D), "h": (B, m, 2)}, float32, or float64 of a layer in float64.
Record: retention |a| (B, L, m), size |h| (B, L, m).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.mixers.base import Mixer, Output, State, at_least_float32, check_at_least, check_time_steps, state_type
from lab.ops import causal_conv, linear_recurrence
from lab.ops.complex import exp


class GeometricDriftField(Mixer):
    """theta_max: the largest turn of a step, in radians. dt, where the input says nothing, starts log-uniform in [dt_min, dt_max], and
    spans that range within each head. M (H, H) starts as the identity: heads are read apart."""

    def __init__(
        self,
        d_model: int,
        n_heads: int = 8,
        conv_kernel: int = 4,
        theta_max: float = math.pi / 8,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__()
        check_at_least("GeometricDriftField", 1, d_model=d_model, n_heads=n_heads, conv_kernel=conv_kernel)
        check_time_steps("GeometricDriftField", dt_min, dt_max)
        if d_model % (2 * n_heads):
            raise ValueError(
                f"GeometricDriftField: d_model={d_model} must be a multiple of 2 n_heads = {2 * n_heads}: a head has complex channels"
            )
        if not 0 < theta_max <= math.pi:
            raise ValueError(f"GeometricDriftField: theta_max={theta_max} must be above 0 and at most pi")
        self.d_model, self.n_heads, self.m = d_model, n_heads, d_model // 2
        self.theta_max, self.dt_min, self.dt_max = theta_max, dt_min, dt_max
        self.conv_weight = nn.Parameter(torch.empty(conv_kernel, d_model))
        self.conv_bias = nn.Parameter(torch.empty(d_model))
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.bias = nn.Parameter(torch.empty(self.m))
        self.head_mixing = nn.Parameter(torch.empty(n_heads, n_heads))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = len(self.conv_weight) ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        channels = self.m // self.n_heads
        share = (
            torch.arange(channels)[:, None] + torch.rand(channels, self.n_heads)
        ) / channels  # one in each part of [0, 1), of every head
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        dt = (low + (high - low) * share).exp().flatten()
        with torch.no_grad():
            self.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        nn.init.eye_(self.head_mixing)

    def mix(self, x: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        conv, h = (None, None) if state is None else (state["conv"], state["h"])
        u, tail = causal_conv(x, self.conv_weight, self.conv_bias, state=conv, lengths=lengths)
        theta, delta, v, gate = self.in_proj(F.silu(u)).split([self.m, self.m, self.d_model, self.d_model], -1)
        angle = self.theta_max * torch.tanh(at_least_float32(theta))
        dt = F.softplus(at_least_float32(delta) + at_least_float32(self.bias))
        drift = exp(torch.stack([-dt, angle], -1))
        into = -torch.expm1(-dt)[..., None] * v.unflatten(-1, (self.m, 2))
        states, last = linear_recurrence(drift, into, h, lengths)
        read = self.mixed(states.flatten(-2).to(gate.dtype))
        y = self.out_proj(read * torch.sigmoid(gate))
        after = {"conv": tail.to(state_type(tail.dtype), copy=True), "h": last.clone()} if "state" in want else None
        record = {"retention": torch.exp(-dt), "size": states.norm(dim=-1)} if "record" in want else {}
        return Output(y, after, record=record)

    def mixed(self, read: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D): sum_h M_gh of the heads h, for every head g. Channel c belongs to head c mod H: so this is one product
        with a small matrix, on the numbers as they lie."""
        pairs = torch.kron(
            self.head_mixing, torch.eye(2, device=read.device, dtype=self.head_mixing.dtype)
        )  # real and imaginary part alike
        return F.linear(read.unflatten(-1, (-1, 2 * self.n_heads)), pairs).flatten(-2)

    @property
    def time_step_bias(self) -> nn.Parameter:
        return self.bias

    def init_state(self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        like = self.out_proj.weight
        place, kind = device or like.device, state_type(dtype or like.dtype)
        return {
            "conv": torch.zeros(batch_size, len(self.conv_weight) - 1, self.d_model, device=place, dtype=kind),
            "h": torch.zeros(batch_size, self.m, 2, device=place, dtype=kind),
        }
