"""H3: two state spaces, one that shifts and one that remembers, between three projections.      arXiv:2212.14052, section 3

    q, k, v = W x + b;   k'_t = sum_j w_j k_{t-j} + D_k k_t        j = 0 .. N - 1: the shift, a filter of N taps per channel
    S_t = SSM(k'_t v_t^T), d x d numbers per head, each through the state space of its head;   y_t = q_t^T S_t;   out = W_o y + b_o

B = batch, L = length, D = d_model, N = d_state, d = d_head, H = D / d heads. With d = 1: q * SSM(k' * v).
State: {"shift": (B, N - 1, D), the last k, float32 at least; "ssm": what the state space keeps for d d sequences of H channels, with that
number behind the batch: (B, d d, H, N/2, 2) of the diagonal one}.
Record: of the state space, for the first of the d d entries of every head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lab.mixers.base import Mixer, Output, State, check_at_least, state_type
from lab.mixers.s4d import S4DLayer
from lab.mixers.slot import Slotted
from lab.ops import causal_conv
from lab.ops.program import NotCompiled, Program, Value, part


class H3Layer(Slotted):
    """d_state: taps of the shift. ssm_layer: of D / d_head channels, one for each head; None is the diagonal one of the paper, S4DLayer
    with d_state states and init_method="lin", whose parameters belong to a head: its d_head x d_head entries share them."""

    def __init__(self, d_model: int, d_head: int = 1, d_state: int = 64, ssm_layer: Callable[..., Mixer] | None = None) -> None:
        super().__init__()
        check_at_least("H3Layer", 1, d_model=d_model, d_head=d_head, d_state=d_state)
        if d_model % d_head:
            raise ValueError(f"H3Layer: d_model={d_model} must be a multiple of d_head={d_head}")
        self.d_model, self.d_head = d_model, d_head
        self.in_proj = nn.Linear(d_model, 3 * d_model)  # q, k, v
        self.shift = nn.Parameter(torch.empty(d_state, d_model))  # w_{N-1} .. w_0
        self.D = nn.Parameter(torch.empty(d_model))  # D_k; that of S is the state space's own
        self.put(ssm_layer or partial(S4DLayer, d_state=d_state, init_method="lin"), d_model // d_head)
        self.out_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(len(self.shift))  # as a convolution of so many taps starts
        nn.init.uniform_(self.shift, -bound, bound)
        nn.init.normal_(self.D)

    def mix(self, x: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        d = self.d_head
        before = (None, None) if state is None else (state["shift"], merged(state["ssm"]))
        q, k, v = self.in_proj(x).chunk(3, -1)
        shifted, tail = causal_conv(k, self.shift, state=before[0], lengths=lengths)
        k = shifted + self.D * k
        q, k, v = (t.unflatten(-1, (-1, d)).movedim(-1, 1) for t in (q, k, v))  # (B, d, L, H)
        kv = k[:, :, None] * v[:, None]  # (B, d, d, L, H)
        of_each = None if lengths is None else lengths.repeat_interleave(d * d)
        out = self.inside(kv.flatten(0, 2), before[1], of_each, tuple(name for name in want if name != "record"))
        S = out.y.unflatten(0, (-1, d, d))
        y = (q[:, :, None] * S).sum(1).movedim(1, -1).flatten(-2)  # (B, L, D)
        after = None
        if "state" in want:
            after = {"shift": tail.to(state_type(tail.dtype), copy=True), "ssm": split(out.state, d * d)}
        record = self.inside(kv[:, 0, 0], None, lengths, want).record if "record" in want else {}
        return Output(self.out_proj(y.to(x.dtype)), after, out.losses, record)

    def program(self, p: Program, x: Value, state: State) -> Value:
        if self.d_head > 1:
            raise NotCompiled(f"H3Layer with d_head={self.d_head}, above 1, has no program")
        assert self.ssm is not None
        q, k, v = p.linear(self.in_proj, x).split(x.width, x.width, x.width)
        k = p.add(p.conv(k, self.shift, None, state["shift"]), p.multiply(k, p.constant(self.D)))
        S = part(self.ssm).program(p, p.multiply(k, v), merged(state["ssm"]))
        return p.linear(self.out_proj, p.multiply(q, S))

    def init_state(self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        self.check_causal()
        assert self.ssm is not None
        (N, D), copies = self.shift.shape, self.d_head**2
        shift = torch.zeros(batch_size, N - 1, D, device=device or self.D.device, dtype=state_type(dtype or self.D.dtype))
        return {"shift": shift, "ssm": split(self.ssm.init_state(batch_size * copies, device, dtype), copies)}

    def reserve(self, state: State, n: int) -> State:
        assert self.ssm is not None
        return state | {"ssm": split(self.ssm.reserve(merged(state["ssm"]), n), self.d_head**2)}


def merged(state: State) -> State:
    """Of tensors (B, copies, ...), tensors (B copies, ...)."""
    return pytree.tree_map_only(Tensor, lambda t: t.flatten(0, 1), state)


def split(state: State, copies: int) -> State:
    """Of tensors (B copies, ...), tensors (B, copies, ...)."""
    return pytree.tree_map_only(Tensor, lambda t: t.unflatten(0, (-1, copies)), state)
