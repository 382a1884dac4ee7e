"""The convolution kernel of a diagonal state space.      K[h, l] = 2 Re sum_n c[h, n] e^{w[h, n] l},   l = 0 .. L - 1

H = channels, N = states, one of each pair of conjugates. With w = dt A and c = C B (e^{dt A} - 1) / A it is S4D's kernel under zero-order
hold (arXiv:2206.11893, section 3).

Backends
    native     C++ and CUDA: powers carried along the positions, restarted from double precision (csrc/*/ssm_kernel*); no (H, N, L).
    triton     the same on a GPU, with angles reduced in double precision (lab/ops/triton/vandermonde.py).
    torch      a Vandermonde matrix in real numbers, exportable; it holds (H, N, L).
    reference  the formula in a plain loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lab.ops import native
from lab.ops.backend import Backend, Op, differentiable_once
from lab.ops.triton import launch


def ssm_kernel(w: Tensor, c: Tensor, length: int) -> Tensor:
    """w, c (H, N, 2), complex numbers as pairs (re, im), the real part of w <= 0 -> K (H, length).

    Computes in float32 or, given any float64, in float64. Differentiable once in both.
    """
    if w.ndim != 3 or w.shape != c.shape or w.shape[-1] != 2:
        raise ValueError(f"ssm_kernel: expected w and c (H, N, 2), got {tuple(w.shape)} and {tuple(c.shape)}")
    dtype = torch.promote_types(torch.promote_types(w.dtype, c.dtype), torch.float32)
    return SSM_KERNEL(w.to(dtype), c.to(dtype), length)


def reference(w: Tensor, c: Tensor, length: int) -> Tensor:
    w, c = torch.view_as_complex(w), torch.view_as_complex(c)
    steps = [2 * (c * torch.exp(w * position)).sum(1).real for position in range(length)]
    return torch.stack(steps, 1) if steps else w.real[:, :0]


def torch_backend(w: Tensor, c: Tensor, length: int) -> Tensor:
    (w_re, w_im), (c_re, c_im) = w.unbind(-1), c.unbind(-1)
    position = torch.arange(length, device=w.device, dtype=w.dtype)
    size, angle = torch.exp(w_re[..., None] * position), w_im[..., None] * position  # (H, N, L)
    return 2 * (c_re[:, None] @ (size * angle.cos()) - c_im[:, None] @ (size * angle.sin()))[:, 0]


def native_backend(w: Tensor, c: Tensor, length: int) -> Tensor:
    return forward_op(w, c, length, "native")


def triton_backend(w: Tensor, c: Tensor, length: int) -> Tensor:
    return forward_op(w, c, length, "triton")


@torch.library.custom_op("lab::ssm_kernel", mutates_args=())
def forward_op(w: Tensor, c: Tensor, length: int, backend: str) -> Tensor:
    if backend == "triton":
        return launch.ssm_kernel(w, c, length)
    K = w.new_empty(w.shape[0], length)
    native.call("ssm_kernel", w.dtype, w.contiguous(), c.contiguous(), K, w.shape[0], w.shape[1], length, work=2 * w.numel() * length)
    return K


@forward_op.register_fake
def _(w: Tensor, c: Tensor, length: int, backend: str) -> Tensor:
    return w.new_empty(w.shape[0], length)


@torch.library.custom_op("lab::ssm_kernel_backward", mutates_args=())
def backward_op(g: Tensor, w: Tensor, c: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """g (H, L) of K -> gradients of w and c."""
    if backend == "triton":
        return launch.ssm_kernel_backward(g, w, c)
    w, c, g = (t.contiguous() for t in (w, c, g))
    gw, gc = torch.empty_like(w), torch.empty_like(c)
    native.call("ssm_kernel_backward", g.dtype, w, c, g, gw, gc, w.shape[0], w.shape[1], g.shape[1], work=4 * w.numel() * g.shape[1])
    return gw, gc


@backward_op.register_fake
def _(g: Tensor, w: Tensor, c: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(w, memory_format=torch.contiguous_format), torch.empty_like(c, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    w, c, _, ctx.backend = inputs
    ctx.save_for_backward(w, c)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return *backward_op(g, *ctx.saved_tensors, ctx.backend), None, None


differentiable_once("ssm_kernel", forward_op, backward_op, _save, _backward, twice="torch")


def flops(w: Tensor, c: Tensor, length: int) -> float:
    """A complex multiply-add for each state and position, the power being carried along."""
    return 8 * w.shape[0] * w.shape[1] * length


SSM_KERNEL = Op(
    "ssm_kernel",
    (
        Backend("native", native_backend, supports=lambda w, c, length: native.why_not(w, c)),
        Backend("triton", triton_backend, supports=lambda w, c, length: launch.why_not(w, c)),
        Backend("torch", torch_backend),
        Backend("reference", reference),
    ),
    example=lambda: (-torch.rand(5, 3, 2), torch.randn(5, 3, 2), 9),
    flops=flops,
)
