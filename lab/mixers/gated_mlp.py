"""A gated MLP, with a state space on one of its branches.      arXiv:2002.05202 without one, arXiv:2206.13947 (GSS) with one

    a = act(W_1 x + b_1),  b = act(W_2 x + b_2),  a <- SSM(a) where there is one,  out = W_3 (a * b) + b_3

B = batch, L = length, D = d_model, E = expand_factor D. State: {"ssm": that of the state space}, {} without one, where every
token is computed by itself. Record: that of the state space.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lab.layers.activation import ACTIVATIONS, Activation, check_activation
from lab.mixers.base import Mixer, Output, State, check_at_least
from lab.mixers.slot import Slotted
from lab.ops.program import Program, Value, part


class GatedMLP(Slotted):
    """ssm_layer: of E channels; None mixes nothing over time. activation: of both branches."""

    def __init__(
        self,
        d_model: int,
        expand_factor: int = 4,
        activation: Activation = "silu",
        ssm_layer: Callable[..., Mixer] | None = None,
    ) -> None:
        super().__init__()
        check_at_least("GatedMLP", 1, d_model=d_model, expand_factor=expand_factor)
        check_activation("GatedMLP", activation)
        self.d_model = d_model
        self.activation: Activation = activation
        self.in_proj = nn.Linear(d_model, 2 * expand_factor * d_model)  # W_1, W_2
        self.put(ssm_layer, expand_factor * d_model)
        self.out_proj = nn.Linear(expand_factor * d_model, d_model)

    def extra_repr(self) -> str:
        return f"activation={self.activation}" + ("" if self.ssm else ", mixes nothing over time")

    def mix(self, x: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        a, b = ACTIVATIONS[self.activation](self.in_proj(x)).chunk(2, -1)
        if self.ssm is None:
            return Output(self.out_proj(a * b), {})
        out = self.inside(a, None if state is None else state["ssm"], lengths, want)
        return Output(self.out_proj(out.y * b), {"ssm": out.state}, out.losses, out.record)

    def program(self, p: Program, x: Value, state: State) -> Value:
        both = p.apply(self.activation, p.linear(self.in_proj, x))
        a, b = both.split(both.width // 2, both.width // 2)
        if self.ssm is not None:
            a = part(self.ssm).program(p, a, state["ssm"])
        return p.linear(self.out_proj, p.multiply(a, b))

    def init_state(self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        self.check_causal()
        return {} if self.ssm is None else {"ssm": self.ssm.init_state(batch_size, device, dtype)}
