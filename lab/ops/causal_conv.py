"""Depthwise, dilated, causal convolution with its tail carried on.      y_t = bias + sum_k w_k x_{t - (K - 1 - k) dilation}

B = batch, L = length, D = channels, K = taps, T = (K - 1) dilation inputs before the first one. Mamba has K 4, dilation 1.

Backends
    native     C++ and CUDA, on the layout (B, L, D) as it is (csrc/*/causal_conv*).
    torch      one shifted product for each tap, exportable.
    reference  the formula in plain loops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lab.ops import native
from lab.ops.backend import Backend, Op, differentiable_once, exporting


def causal_conv(
    x: Tensor, w: Tensor, bias: Tensor | None = None, dilation: int = 1, state: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x (B, L, D), w (K, D), bias (D,), state (B, T, D), the inputs before x, or None for zeros -> y (B, L, D), the next state (B, T, D).

    The next state ends with the last real input, number lengths[b] (B,) of each row; without lengths, number L. Half precision is
    computed in float32; the result has the dtype of x. Differentiable once in every tensor.
    """
    (B, L, D), K = x.shape, w.shape[0]
    tail = (K - 1) * dilation
    if (
        w.shape != (K, D)
        or dilation < 1
        or (bias is not None and bias.shape != (D,))
        or (state is not None and state.shape != (B, tail, D))
    ):
        raise ValueError(
            f"causal_conv: with x {tuple(x.shape)} and w {tuple(w.shape)} expected w (K, {D}), bias ({D},), dilation above 0 and state "
            f"({B}, {tail}, {D}); got bias {None if bias is None else tuple(bias.shape)}, dilation {dilation}, "
            f"state {None if state is None else tuple(state.shape)}"
        )
    if not K:
        raise ValueError(f"causal_conv: w {tuple(w.shape)} has no taps, it must have at least 1")
    if not x.is_floating_point():
        raise ValueError(f"causal_conv: x must hold floating point numbers, as y takes its dtype; got {x.dtype}")
    dtype = torch.float32
    for t in (x, w, bias, state):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    before = x.new_zeros(B, tail, D, dtype=dtype) if state is None else state.to(dtype)
    offset = x.new_zeros(D, dtype=dtype) if bias is None else bias.to(dtype)
    y = CAUSAL_CONV(x.to(dtype), w.to(dtype), offset, before, dilation)
    if lengths is None and exporting():
        after = torch.cat([before, x.to(dtype)], 1)[:, L:]  # torch.export takes the maximum below for a promise that L > tail
    elif lengths is None:
        after = torch.cat([before[:, L:], x[:, max(L - tail, 0) :].to(dtype)], 1)
    else:
        seen = torch.cat([before, x.to(dtype)], 1)
        place = lengths.to(x.device, torch.long)[:, None] + torch.arange(tail, device=x.device)
        after = seen.gather(1, place[..., None].expand(-1, -1, D))
    return y.to(x.dtype), after.to(before.dtype if state is None else state.dtype)


# Each backend maps x (B, L, D), w (K, D), bias (D), state (B, T, D), all of one dtype, to y (B, L, D).


def reference(x: Tensor, w: Tensor, bias: Tensor, state: Tensor, dilation: int) -> Tensor:
    seen = torch.cat([state, x], 1)
    steps = []
    for t in range(x.shape[1]):
        y = bias
        for k in range(w.shape[0]):
            y = y + w[k] * seen[:, t + k * dilation]
        steps.append(y)
    return torch.stack(steps, 1) if steps else x


def torch_backend(x: Tensor, w: Tensor, bias: Tensor, state: Tensor, dilation: int) -> Tensor:
    seen, L = torch.cat([state, x], 1), x.shape[1]
    y = bias
    for k in range(w.shape[0]):
        y = y + w[k] * seen[:, k * dilation : k * dilation + L]
    return y


@torch.library.custom_op("lab::causal_conv", mutates_args=())
def native_backend(x: Tensor, w: Tensor, bias: Tensor, state: Tensor, dilation: int) -> Tensor:
    x, w, bias, state = (t.contiguous() for t in (x, w, bias, state))
    y = torch.empty_like(x)
    native.call("causal_conv", x.dtype, x, w, bias, state, y, dilation, *x.shape, w.shape[0], work=x.numel() * (4 + w.shape[0]))
    return y


@native_backend.register_fake
def _(x: Tensor, w: Tensor, bias: Tensor, state: Tensor, dilation: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("lab::causal_conv_backward", mutates_args=())
def backward_op(gy: Tensor, x: Tensor, w: Tensor, state: Tensor, dilation: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gy (B, L, D) -> gradients of x, w, bias, state."""
    gy, x, w, state = (t.contiguous() for t in (gy, x, w, state))
    (B, L, D), K = x.shape, w.shape[0]
    gx, gstate, gw, gbias = torch.empty_like(x), torch.empty_like(state), x.new_empty(B, K, D), x.new_empty(B, D)
    native.call("causal_conv_backward", x.dtype, x, w, state, gy, gx, gstate, gw, gbias, dilation, B, L, D, K, work=2 * x.numel() * (4 + K))
    return gx, gw.sum(0), gbias.sum(0), gstate


@backward_op.register_fake
def _(gy: Tensor, x: Tensor, w: Tensor, state: Tensor, dilation: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    contiguous = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w, state)]
    return contiguous[0], contiguous[1], w.new_empty(w.shape[1]), contiguous[2]


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, w, _, state, ctx.dilation = inputs
    ctx.save_for_backward(x, w, state)


def _backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    return *backward_op(gy, *ctx.saved_tensors, ctx.dilation), None


differentiable_once("causal_conv", native_backend, backward_op, _save, _backward, twice="torch")


def flops(x: Tensor, w: Tensor, bias: Tensor, state: Tensor, dilation: int) -> float:
    return 2 * x.numel() * w.shape[0]


CAUSAL_CONV = Op(
    "causal_conv",
    (
        Backend("native", native_backend, supports=lambda *args: native.why_not(*args[:-1])),
        Backend("torch", torch_backend),
        Backend("reference", reference),
    ),
    example=lambda: (torch.randn(2, 9, 5), torch.randn(4, 5), torch.randn(5), torch.randn(2, 3, 5), 1),
    flops=flops,
)
