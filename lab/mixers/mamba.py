"""Mamba: a selective state space between a gate and a short convolution.      arXiv:2312.00752, section 3.4

    (x, z) = W_in u;  x = SiLU(conv(x));  (delta, B, C) = W_x x;  dt = softplus(W_dt delta + b)
    h_t = e^{dt_t A} h_{t-1} + (dt_t x_t) B_t,   y_t = C_t . h_t + D x_t,   out = W_out(y * SiLU(z))

With an `ssm_layer`, that computes y from x in place of the selective scan: y = SSM(x), the lines of dt and h are gone.
B = batch, L = length, D = d_model, E = expand_factor D, N = d_state, K = d_conv, R = dt_rank.
State: {"conv": (B, K - 1, E), "h": (B, E, N)}, float32, or float64 of a layer in float64; with an ssm_layer {"conv", "ssm": its own}.
Record: eigenvalues A (E, N, 2) with imaginary part 0, dt (B, L, E, 1), B (B, L, N), C (B, L, N); with an ssm_layer its own.
Parameters have the names of the public implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.layers.hippo import InitMethod, eigenvalues
from lab.mixers.base import Mixer, Output, State, at_least_float32, check_at_least, check_time_steps, state_type
from lab.mixers.slot import Slotted
from lab.ops import causal_conv, selective_scan
from lab.ops.program import Program, Value, part


class MambaLayer(Slotted):
    """init_method: the states are real and decay as fast as its eigenvalues are large; `real` is 1 .. N. dt_rank: None means D / 16,
    rounded up. dt starts log-uniform in [dt_min, dt_max]. n_layers: of the model around it; W_out starts smaller by its root. ssm_layer:
    of E channels, in place of the selective scan, whose arguments d_state, dt_rank, init_method, dt_min and dt_max then mean nothing."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        expand_factor: int = 2,
        d_conv: int = 4,
        dt_rank: int | None = None,
        init_method: InitMethod = "real",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        n_layers: int = 1,
        ssm_layer: Callable[..., Mixer] | None = None,
    ) -> None:
        super().__init__()
        check_at_least("MambaLayer", 1, d_model=d_model, d_state=d_state, expand_factor=expand_factor, d_conv=d_conv, n_layers=n_layers)
        check_time_steps("MambaLayer", dt_min, dt_max)
        self.d_model, self.d_inner, self.d_state, self.d_conv = d_model, expand_factor * d_model, d_state, d_conv
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        check_at_least("MambaLayer", 1, dt_rank=self.dt_rank)
        self.init_method, self.dt_min, self.dt_max, self.n_layers = init_method, dt_min, dt_max, n_layers
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner)  # holds the weights; causal_conv computes
        self.put(ssm_layer, self.d_inner)
        if self.ssm is None:
            self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
            self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
            self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state))
            self.D = nn.Parameter(torch.empty(self.d_inner))
            for parameter in (self.A_log, self.D):
                parameter._optim = {"weight_decay": 0.0}  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.ssm is None:
            dt = torch.empty(self.d_inner).uniform_(math.log(self.dt_min), math.log(self.dt_max)).exp().clamp(min=1e-4)
            nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            with torch.no_grad():
                self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
                self.A_log.copy_(eigenvalues(self.init_method, 2 * self.d_state).abs().log().expand_as(self.A_log))
            nn.init.ones_(self.D)
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5)).div_(math.sqrt(self.n_layers))

    def mix(self, x: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        u, z = self.in_proj(x).chunk(2, -1)
        before = None if state is None else state["conv"]
        u, tail = causal_conv(u, self.conv1d.weight[:, 0].T, self.conv1d.bias, state=before, lengths=lengths)
        u = F.silu(u)
        after = {"conv": tail.to(state_type(tail.dtype), copy=True)} if "state" in want else None
        if self.ssm is None:
            inner, name = self.scan(u, z, None if state is None else state["h"], lengths, want), "h"
        else:
            inner, name = self.inside(u, None if state is None else state["ssm"], lengths, want), "ssm"
            inner = inner._replace(y=inner.y * F.silu(z))
        if after is not None:
            after[name] = inner.state
        return Output(self.out_proj(inner.y), after, inner.losses, inner.record)

    def scan(self, u: Tensor, z: Tensor, h: Tensor | None, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        """u, z (B, L, E) -> y * SiLU(z) (B, L, E), the last state (B, E, N) and the record."""
        delta, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt = F.softplus(at_least_float32(self.dt_proj(delta)))
        A = -at_least_float32(self.A_log).exp()
        y, last = selective_scan(u, dt, A, B, C, self.D, z, h, lengths)
        record = {"eigenvalues": torch.stack([A, torch.zeros_like(A)], -1), "dt": dt[..., None], "B": B, "C": C} if "record" in want else {}
        return Output(y, last, record=record)

    def program(self, p: Program, x: Value, state: State) -> Value:
        u, z = p.linear(self.in_proj, x).split(self.d_inner, self.d_inner)
        u = p.apply("silu", p.conv(u, self.conv1d.weight[:, 0].T, self.conv1d.bias, state["conv"]))
        if self.ssm is None:
            delta, B, C = p.linear(self.x_proj, u).split(self.dt_rank, self.d_state, self.d_state)
            dt = p.apply("softplus", p.linear(self.dt_proj, delta))
            y = p.scan(u, dt, -self.A_log.exp(), B, C, self.D, state["h"])
        else:
            y = part(self.ssm).program(p, u, state["ssm"])
        return p.linear(self.out_proj, p.multiply(y, p.apply("silu", z)))

    @property
    def time_step_bias(self) -> nn.Parameter | None:
        return self.dt_proj.bias if self.ssm is None else None

    def init_state(self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        self.check_causal()
        like = self.out_proj.weight
        place, kind = device or like.device, state_type(dtype or like.dtype)
        conv = torch.zeros(batch_size, self.d_conv - 1, self.d_inner, device=place, dtype=kind)
        if self.ssm is not None:
            return {"conv": conv, "ssm": self.ssm.init_state(batch_size, device, dtype)}
        return {"conv": conv, "h": torch.zeros(batch_size, self.d_inner, self.d_state, device=place, dtype=kind)}
