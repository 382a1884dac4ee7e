"""Cauchy sums at the roots of unity, over conjugate pairs.      Q[h, r, k] = sum_n v / (i s_k - c_k w) + its partner, k = 0 .. L / 2

s_k = sin(pi k / L), c_k = cos(pi k / L): i s / c = (1 - z) / (1 + z) at z = e^{-2 pi i k / L}, and multiplied by c nothing is infinite
where z = -1. The partner has conj(v) and conj(w). H = channels, N = states, one of each pair; R numerators v share their poles w. With
w = dt A / 2 these are the sums of S4's generating function (arXiv:2111.00396, section 3; a layer whose correction has rank 1 needs R = 4).

Both of a pair make one fraction in real numbers: (2 i s Re v - 2 c Re(v conj w)) / (c^2 |w|^2 - s^2 - 2 i s c Re w).

Backends
    native     C++ and CUDA, all R in one pass (csrc/*/cauchy_kernel*); no (H, N, L).
    torch      that fraction, exportable; it holds (H, N, L / 2).
    reference  the sum of both partners in complex numbers, in a plain loop over k.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lab.ops import native
from lab.ops.backend import Backend, Op, differentiable_once, without_autocast

WORK = 8  # multiply-adds for each pole, numerator and point


def cauchy_kernel(w: Tensor, v: Tensor, length: int) -> Tensor:
    """w (H, N, 2), v (H, R, N, 2), complex numbers as pairs (re, im), the real part of w < 0; length >= 1 -> Q (H, R, length // 2 + 1, 2).

    Computes in float32 or, given any float64, in float64. Differentiable once in both.
    """
    if w.ndim != 3 or v.ndim != 4 or w.shape != (v.shape[0], *v.shape[2:]) or w.shape[-1] != 2:
        raise ValueError(f"cauchy_kernel: expected w (H, N, 2) and v (H, R, N, 2), got {tuple(w.shape)} and {tuple(v.shape)}")
    if length < 1:
        raise ValueError(f"cauchy_kernel: length={length} must be at least 1")
    dtype = torch.promote_types(torch.promote_types(w.dtype, v.dtype), torch.float32)
    return CAUCHY_KERNEL(w.to(dtype), v.to(dtype), length)


def reference(w: Tensor, v: Tensor, length: int) -> Tensor:
    w, v = torch.view_as_complex(w)[:, None], torch.view_as_complex(v)
    points = []
    for k in range(length // 2 + 1):
        s, c = math.sin(math.pi * k / length), math.cos(math.pi * k / length)
        points.append((v / (1j * s - c * w) + v.conj() / (1j * s - c * w.conj())).sum(-1))
    return torch.view_as_real(torch.stack(points, -1))


def torch_backend(w: Tensor, v: Tensor, length: int) -> Tensor:
    (w_re, w_im), (v_re, v_im) = w[..., None, :].unbind(-1), v.unbind(-1)  # (H, N, 1), (H, R, N)
    angle = math.pi / length * torch.arange(length // 2 + 1, device=w.device, dtype=torch.float64)
    s, c = angle.sin().to(w.dtype), angle.cos().to(w.dtype)
    near = c * torch.sqrt(w_re.square() + w_im.square())
    e, f = (near - s) * (near + s), -2 * s * c * w_re  # (H, N, K)
    inverse = 1 / (e.square() + f.square())
    E, F = e * inverse, f * inverse
    a, b = 2 * v_re, 2 * (v_re * w_re.mT + v_im * w_im.mT)
    with without_autocast(w):
        return torch.stack([s * (a @ F) - c * (b @ E), s * (a @ E) + c * (b @ F)], -1)


@torch.library.custom_op("lab::cauchy_kernel", mutates_args=())
def native_backend(w: Tensor, v: Tensor, length: int) -> Tensor:
    H, R, N, _ = v.shape
    Q = v.new_empty(H, R, length // 2 + 1, 2)
    native.call("cauchy_kernel", w.dtype, w.contiguous(), v.contiguous(), Q, H, N, R, length, work=WORK * v.numel() * length)
    return Q


@native_backend.register_fake
def _(w: Tensor, v: Tensor, length: int) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[1], length // 2 + 1, 2)


@torch.library.custom_op("lab::cauchy_kernel_backward", mutates_args=())
def backward_op(g: Tensor, w: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """g (H, R, K, 2) of Q -> gradients of w and v."""
    H, R, N, _ = v.shape
    g, w, v = (t.contiguous() for t in (g, w, v))
    gw, gv = torch.empty_like(w), torch.empty_like(v)
    native.call("cauchy_kernel_backward", g.dtype, w, v, g, gw, gv, H, N, R, length, work=2 * WORK * v.numel() * length)
    return gw, gv


@backward_op.register_fake
def _(g: Tensor, w: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(w, memory_format=torch.contiguous_format), torch.empty_like(v, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    w, v, ctx.length = inputs
    ctx.save_for_backward(w, v)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return *backward_op(g, *ctx.saved_tensors, ctx.length), None


differentiable_once("cauchy_kernel", native_backend, backward_op, _save, _backward, twice="torch")


def flops(w: Tensor, v: Tensor, length: int) -> float:
    """At a point: for each pole and numerator 8 of the sums, for each pole 11 of its denominator, for each numerator 6 of the result."""
    H, R, N, _ = v.shape
    return H * (length // 2 + 1) * (8 * R * N + 11 * N + 6 * R)


CAUCHY_KERNEL = Op(
    "cauchy_kernel",
    (
        Backend("native", native_backend, supports=lambda w, v, length: native.why_not(w, v)),
        Backend("torch", torch_backend),
        Backend("reference", reference),
    ),
    example=lambda: (-torch.rand(5, 3, 2), torch.randn(5, 4, 3, 2), 9),
    flops=flops,
)
