"""A linear recurrence, per channel.      h_t = a_t h_{t-1} + x_t

B = batch, L = length, D = channels. a may change with every step or be one number per channel; all may be complex. The gradient is the same
recurrence backwards in time: g_t = dLoss/dh_t + conj(a_{t+1}) g_{t+1}, of x_t; g_t conj(h_{t-1}), of a_t; conj(a_0) g_0, of h_{-1}.

Backends
    native     C++, one pass over the data (csrc/cpu/linear_recurrence.cpp); CUDA, three where there are few channels.
    triton     on a GPU, by blocks of time that are scanned at once (lab/ops/triton/scans.py).
    torch      log2(L) rounds of doubling (Hillis and Steele, 1986). While exporting, a `scan` of free length in real numbers.
    reference  the formula in a plain loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lab.ops import native
from lab.ops.backend import Backend, Op, differentiable_once, exporting
from lab.ops.complex import multiply
from lab.ops.triton import launch

MEMORY = 8  # multiply-adds in the time of an element, which is that of reading and writing it
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def linear_recurrence(a: Tensor, x: Tensor, h0: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """a (B, L, D) or (D,), x (B, L, D), h0 (B, D) or None for zeros -> h (B, L, D), last (B, D).

    Complex numbers come as such, or as pairs (re, im) in one more dimension of every tensor: a (B, L, D, 2) or (D, 2), x (B, L, D, 2), ...
    last is the state after the last real token, number lengths[b] (B,); without lengths, number L; with none, h0. Computes in float32 or
    complex64 at least. Differentiable once in every tensor.
    """
    if x.ndim == 4 and x.shape[-1] == 2:
        return _in_pairs(a, x, h0, lengths)
    B, L, D = x.shape if x.ndim == 3 else (0, 0, 0)
    if x.ndim != 3 or a.shape != ((B, L, D) if a.ndim == 3 else (D,)) or (h0 is not None and h0.shape != (B, D)):
        got = "None" if h0 is None else tuple(h0.shape)
        raise ValueError(
            f"linear_recurrence: expected x (B, L, D), a (B, L, D) or (D,) and h0 (B, D); got {tuple(x.shape)}, {tuple(a.shape)} and {got}"
        )
    dtype = torch.float32
    for t in (a, x, h0):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    start = x.new_zeros(B, D, dtype=dtype) if h0 is None else h0.to(dtype)
    h = LINEAR_RECURRENCE(a.to(dtype), x.to(dtype), start)
    if lengths is None:
        return h, h[:, -1] if L else start
    index = lengths.to(h.device, torch.long)[:, None, None].expand(-1, 1, D)
    return h, torch.cat([start[:, None], h], 1).gather(1, index)[:, 0]


def _in_pairs(a: Tensor, x: Tensor, h0: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(a.dtype, x.dtype), torch.float32)
    if exporting():  # a file holds real numbers
        start = torch.zeros_like(x[:, 0], dtype=dtype) if h0 is None else h0.to(dtype)
        h = exported(a.to(dtype), x.to(dtype), start)
        if lengths is None:
            return h, h[:, -1]
        index = lengths.to(h.device, torch.long)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return h, torch.cat([start[:, None], h], 1).gather(1, index)[:, 0]
    a, x = (torch.view_as_complex(t.to(dtype).contiguous()) for t in (a, x))
    h, last = linear_recurrence(a, x, None if h0 is None else torch.view_as_complex(h0.to(dtype).contiguous()), lengths)
    return torch.view_as_real(h), torch.view_as_real(last)


# Each backend maps a (B, L, D) or (D,), x (B, L, D), h0 (B, D), all of one dtype, to h (B, L, D).


def reference(a: Tensor, x: Tensor, h0: Tensor) -> Tensor:
    h, steps = h0, []
    for t in range(x.shape[1]):
        h = (a if a.ndim == 1 else a[:, t]) * h + x[:, t]
        steps.append(h)
    return torch.stack(steps, 1) if steps else x


def torch_backend(a: Tensor, x: Tensor, h0: Tensor) -> Tensor:
    if exporting():
        return exported(a, x, h0)
    return forward_op(a, x, h0, "torch")


def native_backend(a: Tensor, x: Tensor, h0: Tensor) -> Tensor:
    return forward_op(a, x, h0, "native")


def triton_backend(a: Tensor, x: Tensor, h0: Tensor) -> Tensor:
    return forward_op(a, x, h0, "triton")


def exported(a: Tensor, x: Tensor, h0: Tensor) -> Tensor:
    """The same, with x (B, L, D) or in pairs (B, L, D, 2), in operators that an exported file can hold: a loop whose length is an input.
    Under torch.no_grad()."""
    if x.is_complex():
        raise RuntimeError("linear_recurrence: an exported file holds no complex numbers; give them as pairs (..., 2)")
    decays, inputs, h0 = a.expand_as(x).transpose(0, 1), x.transpose(0, 1), h0.contiguous()
    if torch.jit.is_tracing():
        return scripted_loop()(decays, inputs, h0, x.ndim == 4).transpose(0, 1)
    from torch._higher_order_ops import scan  # private, so not needed by anything but an export

    def step(h: Tensor, now: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h = (multiply(now[0], h) if x.ndim == 4 else now[0] * h) + now[1]
        return h, h.clone()

    _, h = scan(step, h0, (decays, inputs))
    return h.transpose(0, 1)


def loop(a: Tensor, x: Tensor, h: Tensor, pairs: bool) -> Tensor:
    steps = [h]
    for t in range(x.shape[0]):
        if pairs:
            h = multiply(a[t], h) + x[t]
        else:
            h = a[t] * h + x[t]
        steps.append(h)
    return torch.stack(steps)[1:]


@cache
def scripted_loop() -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
    """TorchScript's tracer would unroll a Python loop; a scripted one it keeps. Compiled here at the first such export."""
    return torch.jit.script(loop)


# The opaque operator and its gradient, an operator too: a compiled graph sees one node of each.


def doubled(a: Tensor, x: Tensor, h0: Tensor) -> Tensor:
    """x (B, L, ...) -> h. After the round with span s, h_t holds the terms of the last 2s steps and decay_t the product of their decays."""
    L = x.shape[1]
    h = x.clone(memory_format=torch.contiguous_format)
    if not L:
        return h
    decay = a.expand_as(x).clone(memory_format=torch.contiguous_format)
    h[:, 0] += decay[:, 0] * h0
    span = 1
    while span < L:
        h[:, span:] += decay[:, span:] * h[:, :-span].clone()
        decay[:, span:] *= decay[:, :-span].clone()
        span *= 2
    return h


@torch.library.custom_op("lab::linear_recurrence", mutates_args=())
def forward_op(a: Tensor, x: Tensor, h0: Tensor, backend: str) -> Tensor:
    if backend == "torch":
        return doubled(a, x, h0)
    if backend == "triton":
        return launch.linear_recurrence(a, x, h0)
    B, L, D = x.shape
    a, x, h0 = (t.resolve_conj().contiguous() for t in (a, x, h0))
    h = torch.empty_like(x)
    native.call("linear_recurrence", x.dtype, a, x, h0, h, int(a.ndim == 3), B, L, D * (1 + x.is_complex()), work=MEMORY * x.numel())
    return h


@forward_op.register_fake
def _(a: Tensor, x: Tensor, h0: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("lab::linear_recurrence_backward", mutates_args=())
def backward_op(grad: Tensor, a: Tensor, h: Tensor, h0: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """grad (B, L, D) of h -> gradients of a, x, h0."""
    if backend == "triton":
        return launch.linear_recurrence_backward(grad, a, h, h0)
    B, L, D = h.shape
    per_step = a.ndim == 3
    if backend == "torch":
        later = torch.cat([a.expand_as(h)[:, 1:], a.new_zeros(B, min(L, 1), D)], 1).conj()  # the decay that leads on from each step
        g_x = doubled(later.flip(1), grad.flip(1), torch.zeros_like(h0)).flip(1)
        g_a = g_x * torch.cat([h0[:, None], h], 1)[:, :-1].conj()
        g_h0 = (a.expand_as(h)[:, 0].conj() * g_x[:, 0]) if L else torch.zeros_like(h0)
        return (g_a if per_step else g_a.sum((0, 1))), g_x, g_h0
    grad, a, h, h0 = (t.resolve_conj().contiguous() for t in (grad, a, h, h0))
    g_x, g_a, g_h0 = torch.empty_like(h), torch.empty_like(h if per_step else h0), torch.empty_like(h0)
    native.call(
        "linear_recurrence_backward",
        h.dtype,
        a,
        h,
        h0,
        grad,
        g_x,
        g_a,
        g_h0,
        int(per_step),
        B,
        L,
        D * (1 + h.is_complex()),
        work=2 * MEMORY * h.numel(),
    )
    return (g_a if per_step else g_a.sum(0)), g_x, g_h0


@backward_op.register_fake
def _(grad: Tensor, a: Tensor, h: Tensor, h0: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(h), torch.empty_like(h0)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    a, _, h0, ctx.backend = inputs
    ctx.save_for_backward(a, output, h0)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *backward_op(grad, *ctx.saved_tensors, ctx.backend), None


differentiable_once("linear_recurrence", forward_op, backward_op, _save, _backward, twice="reference")


def flops(a: Tensor, x: Tensor, h0: Tensor) -> float:
    """A multiply-add for each number, 8 for a complex one."""
    return x.numel() * (8 if x.is_complex() else 2)


LINEAR_RECURRENCE = Op(
    "linear_recurrence",
    (
        Backend("native", native_backend, supports=lambda a, x, h0: native.why_not(a, x, h0, dtypes=DTYPES)),
        Backend("triton", triton_backend, supports=lambda a, x, h0: launch.why_not(a, x, h0, dtypes=DTYPES)),
        Backend("torch", torch_backend),
        Backend("reference", reference),
    ),
    example=lambda: (torch.rand(2, 9, 5), torch.randn(2, 9, 5), torch.randn(2, 5)),
    flops=flops,
)
