"""Mamba's selective scan: a recurrence whose decay and input depend on the token. Source: arXiv:2312.00752, algorithm 2.

    h_t = e^{dt_t A} h_{t-1} + (dt_t u_t) B_t,   y_t = C_t . h_t + D u_t,   times SiLU(z_t) where z is given

Bt = batch, L = length, E = channels, N = d_state: each channel has N states; B and C are shared by the channels. With complex A, B, C
(one half of the conjugate pairs) y takes 2 Re(C . h).

Backends
    native     C++ and CUDA, the states in registers, one state kept per 16 steps (csrc/*/selective_scan*); real A, NaN where it is above 0.
    triton     on a GPU, by blocks of 16 steps that are scanned at once (lab/ops/triton/scans.py); real A.
    torch      chunks of 64 steps, each by doubling; one state kept per chunk. While exporting, a `scan` of free length; real A.
    reference  the formula in a plain loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.ops import native
from lab.ops.backend import Backend, Op, differentiable_once, exporting
from lab.ops.linear_recurrence import doubled
from lab.ops.triton import launch

CHUNK = 64  # steps; (Bt, CHUNK, E, N) is the largest tensor of the torch backend


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None = None, h0: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """u, dt, z (Bt, L, E), A (E, N) with real part <= 0, B, C (Bt, L, N), D (E,), h0 (Bt, E, N) or None for zeros
    -> y (Bt, L, E) in the dtype of u, last (Bt, E, N), the state after the last real token, number lengths[b] (Bt,) or L.
    y of padding means nothing.

    dt >= 0. Computes in float32 or, given any float64, in float64. Differentiable once in every tensor.
    """
    (Bt, L, E), N = u.shape, A.shape[-1]
    wanted = {"dt": (Bt, L, E), "A": (E, N), "B": (Bt, L, N), "C": (Bt, L, N), "D": (E,), "z": (Bt, L, E), "h0": (Bt, E, N)}
    for (name, shape), t in zip(wanted.items(), (dt, A, B, C, D, z, h0), strict=True):
        if t is not None and t.shape != shape:
            given = f"u {tuple(u.shape)} and A {tuple(A.shape)}"
            raise ValueError(f"selective_scan: with {given}, {name} must be {shape}, got {tuple(t.shape)}")
    if not N:
        raise ValueError(f"selective_scan: A {tuple(A.shape)} has no states, d_state must be at least 1")
    double = any(t is not None and t.dtype in (torch.float64, torch.complex128) for t in (u, dt, A, B, C, D, h0))
    real = torch.float64 if double else torch.float32
    state = (torch.complex128 if double else torch.complex64) if A.is_complex() else real
    if lengths is not None:  # with dt = 0 a step keeps the state; whatever the padding holds, NaN too, must not reach it
        padding = (torch.arange(L, device=u.device) >= lengths.to(u.device)[:, None])[..., None]
        u, dt, B = (t.masked_fill(padding, 0) for t in (u, dt, B))
    start = torch.zeros(Bt, E, N, dtype=state, device=u.device) if h0 is None else h0.to(state)
    y, last = SELECTIVE_SCAN(u.to(real), dt.to(real), A.to(state), B.to(state), C.to(state), D.to(real), start)
    y = y.to(u.dtype)
    return (y if z is None else y * F.silu(z)), last


# Each backend maps these, all of one precision, to y and last.


def reference(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    h, steps = h0, []
    for t in range(u.shape[1]):
        h = advance(h, A, u[:, t], dt[:, t], B[:, t])
        steps.append(read(h, C[:, t]) + D * u[:, t])
    return (torch.stack(steps, 1) if steps else u), h


def read(h: Tensor, C: Tensor) -> Tensor:
    """h (..., E, N), C (..., N) -> C . h (..., E), real"""
    y = (h @ C[..., None])[..., 0]
    return 2 * y.real if y.is_complex() else y


def torch_backend(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    if exporting():
        return exported(u, dt, A, B, C, D, h0)
    y, last, _ = forward_op(u, dt, A, B, C, D, h0, "torch", True)
    return y, last


def native_backend(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    y, last, _ = forward_op(u, dt, A, B, C, D, h0, "native", needs_gradient(u, dt, A, B, C, D, h0))
    return y, last


def triton_backend(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    y, last, _ = forward_op(u, dt, A, B, C, D, h0, "triton", needs_gradient(u, dt, A, B, C, D, h0))
    return y, last


def needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def exported(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """The same in operators that an exported file can hold: a loop whose length is an input. Under torch.no_grad()."""
    inputs = [t.transpose(0, 1) for t in (u, dt, B, C)]
    if torch.jit.is_tracing():
        y, last = scripted_loop()(*inputs, A, h0)
    else:
        from torch._higher_order_ops import scan  # private, so not needed by anything but an export

        def step(h: Tensor, now: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            h = advance(h, A, now[0], now[1], now[2])
            return h, (h @ now[3][..., None])[..., 0]

        last, y = scan(step, h0.contiguous(), tuple(inputs))
    return y.transpose(0, 1) + D * u, last


def advance(h: Tensor, A: Tensor, u: Tensor, dt: Tensor, B: Tensor) -> Tensor:
    """One step: h (Bt, E, N), u, dt (Bt, E), B (Bt, N)."""
    return torch.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B[:, None]


def loop(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    steps = [u[:0]]
    for t in range(u.shape[0]):
        h = advance(h, A, u[t], dt[t], B[t])
        steps.append((h @ C[t][..., None])[None, ..., 0])
    return torch.cat(steps), h


@cache
def scripted_loop() -> Callable[..., tuple[Tensor, Tensor]]:
    """TorchScript's tracer would unroll a Python loop; a scripted one it keeps. Compiled here at the first such export."""
    return torch.jit.script(loop)


def native_starts(u: Tensor, N: int) -> tuple[int, ...]:
    """The shape in which the kernel keeps the state of every 16th step: tiles of vectors of channels."""
    (Bt, L, E), W = u.shape, native.width(u)
    return Bt, -(-E // W), -(-L // 16), N, W


def native_parts(u: Tensor) -> int:
    """The tasks of a row, which add up over their channels for B and C: a function of the shape and the kind of device alone, so that sums
    do not change with threads. On a GPU as many as there are blocks of 32 channels."""
    Bt, _, E = u.shape
    return max(1, -(-E // 32) if u.is_cuda else min(16 // max(Bt, 1), E // 64))


# The opaque operator and its gradient. `starts` holds what the backward pass needs of the forward one: the state at the beginning of each
# chunk, in the layout of the backend.


@torch.library.custom_op("lab::selective_scan", mutates_args=())
def forward_op(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor, backend: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (Bt, L, E), N = u.shape, A.shape[1]
    if backend == "native":
        u, dt, B, C, D, h0 = (t.contiguous() for t in (u, dt, B, C, D, h0))
        y, last = torch.empty_like(u), torch.empty_like(h0)
        starts = u.new_empty(native_starts(u, N) if keep else 0)
        native.call(
            "selective_scan",
            u.dtype,
            u,
            dt,
            base_2(A),
            B,
            C,
            D,
            h0,
            y,
            last,
            starts if keep else None,
            Bt,
            L,
            E,
            N,
            work=12 * u.numel() * N,
        )
        return y, last, starts
    if backend == "triton":
        return launch.selective_scan(u, dt, A, B, C, D, h0, keep)
    h, ys, kept = h0, [D * u[:, :0]], [h0]
    for t in range(0, L, CHUNK):
        x, d, b, c = (s[:, t : t + CHUNK] for s in (u, dt, B, C))
        states = doubled(torch.exp(d[..., None] * A), (d * x)[..., None] * b[:, :, None], h)
        h = states[:, -1].clone()
        ys.append(read(states, c) + D * x)
        kept.append(h)
    return torch.cat(ys, 1), h.clone(), torch.stack(kept)


@forward_op.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor, backend: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "native":
        starts = u.new_empty(native_starts(u, A.shape[1]) if keep else 0)
    elif backend == "triton":
        starts = u.new_empty(launch.scan_starts(u, A.shape[1]) if keep else 0)
    else:
        starts = h0.new_empty(1 + -(-u.shape[1] // CHUNK), *h0.shape)
    return torch.empty_like(u, memory_format=torch.contiguous_format), torch.empty_like(h0), starts


@torch.library.custom_op("lab::selective_scan_backward", mutates_args=())
def backward_op(
    gy: Tensor, glast: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor, backend: str
) -> list[Tensor]:
    """Gradients of y and last -> those of u, dt, A, B, C, D, h0."""
    (Bt, L, E), N = u.shape, A.shape[1]
    if backend == "native":
        u, dt, B, C, D, starts, gy, glast = (t.contiguous() for t in (u, dt, B, C, D, starts, gy, glast))
        if starts.shape != native_starts(u, N):  # the kernel would read beyond its end
            raise ValueError(f"selective_scan: the saved states must be {native_starts(u, N)}, got {tuple(starts.shape)}")
        parts = native_parts(u)
        gu, gdt, gA, gD, gh0 = (t.new_empty(s) for t, s in ((u, u.shape), (u, u.shape), (u, (Bt, E, N)), (u, (Bt, E)), (u, glast.shape)))
        gB, gC = u.new_empty(parts, Bt, L, N), u.new_empty(parts, Bt, L, N)
        grads = (gu, gdt, gA, gB, gC, gD, gh0)
        native.call(
            "selective_scan_backward",
            u.dtype,
            u,
            dt,
            base_2(A),
            B,
            C,
            D,
            starts,
            gy,
            glast,
            *grads,
            parts,
            Bt,
            L,
            E,
            N,
            work=24 * u.numel() * N,
        )
        return [gu, gdt, gA.sum(0), gB.sum(0), gC.sum(0), gD.sum(0), gh0]
    if backend == "triton":
        return launch.selective_scan_backward(gy, glast, u, dt, A, B, C, D, starts)
    gu, gdt, gA, gB, gC, gh = *(torch.zeros_like(t) for t in (u, dt, A, B, C)), glast
    for t in reversed(range(0, L, CHUNK)):
        now = slice(t, t + CHUNK)
        gu[:, now], gdt[:, now], gB[:, now], gC[:, now], of_A, gh = chunk_backward(
            gh, starts[t // CHUNK], A, D, *(s[:, now] for s in (u, dt, B, C, gy))
        )
        gA += of_A
    return [gu, gdt, gA, gB, gC, (gy * u).sum((0, 1)), gh.clone()]


def chunk_backward(
    gh: Tensor, h0: Tensor, A: Tensor, D: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, gy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One chunk of c steps: the gradient gh (Bt, E, N) of its last state -> those of u, dt, B, C, A and of its first state."""
    decay, x = torch.exp(dt[..., None] * A), dt * u
    h = doubled(decay, x[..., None] * B[:, :, None], h0)  # (Bt, c, E, N)
    out = (2 if h.is_complex() else 1) * gy
    g = out[..., None] * C[:, :, None].conj()
    g[:, -1] += gh
    later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1).conj()
    g = doubled(later.flip(1), g.flip(1), torch.zeros_like(gh)).flip(1)  # the gradient of h_t
    of_x = real_part((g * B[:, :, None].conj()).sum(-1))
    through = g * (decay * torch.cat([h0[:, None], h[:, :-1]], 1)).conj()  # the gradient of dt_t A
    of_dt = real_part((through * A.conj()).sum(-1))
    gB, gC = (g * x[..., None]).sum(2), (out[..., None] * h.conj()).sum(2)
    return of_x * dt + D * gy, of_x * u + of_dt, gB, gC, (through * dt[..., None]).sum((0, 1)), decay[:, 0].conj() * g[:, 0]


def real_part(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


def base_2(A: Tensor) -> Tensor:
    """A for powers of 2; NaN where a state would grow, which the kernels do not compute."""
    return (A * math.log2(math.e)).masked_fill(A > 0, math.nan).contiguous()


@backward_op.register_fake
def _(
    gy: Tensor, glast: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor, backend: str
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, dt, A, B, C, D, glast)]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx: Any, gy: Tensor, glast: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *backward_op(gy, glast, *ctx.saved_tensors, ctx.backend), None, None


differentiable_once("selective_scan", forward_op, backward_op, _save, _backward, twice="reference")


def flops(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor) -> float:
    """A token and channel: for each state 2 of e^{dt A}, 1 of (dt u) B, 2 of the multiply-add, 2 of C . h (complex: 7, 2, 8 and 4), and for
    the channel 1 of dt u and 2 of D u."""
    return u.numel() * ((21 if A.is_complex() else 7) * A.shape[1] + 3)


SELECTIVE_SCAN = Op(
    "selective_scan",
    (
        Backend("native", native_backend, supports=native.why_not),
        Backend("triton", triton_backend, supports=lambda u, dt, A, *rest: launch.why_not(A, u, dt, *rest)),  # a complex A is said
        Backend("torch", torch_backend),
        Backend("reference", reference),
    ),
    example=lambda: (
        *(torch.rand(2, 9, 5), torch.rand(2, 9, 5), -torch.rand(5, 3), torch.randn(2, 9, 3), torch.randn(2, 9, 3)),
        *(torch.randn(5), torch.randn(2, 5, 3)),
    ),
    flops=flops,
)
