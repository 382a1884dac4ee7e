"""A causal convolution as long as the sequence, by the Fourier transform.      y_t = sum_{s <= t} K_s u_{t - s} + D u_t

B = batch, L = length, D = channels. Never circular.

Backends
    native     C++ over channels side by side, without transposing u, at 1 to 1.5 times the length; the backward pass transforms u
               anew (csrc/cpu/fft_conv.cpp). On a GPU a sequence stays in a block's shared memory, so it has a LONGEST.
    torch      the real FFT along time, padded to twice the length.
    reference  the formula in a plain loop.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lab.ops import native
from lab.ops.backend import Backend, Op, differentiable_once, exporting

LONGEST = {torch.float32: 8192, torch.float64: 4096}  # sequence that csrc/cuda/fft_conv.cu takes


def fft_conv(u: Tensor, K: Tensor, D: Tensor | None = None) -> Tensor:
    """u (B, L, D), K (D, L' >= L or shorter), D (D,) or None -> y (B, L, D) in the dtype of u. Positions of K beyond L do not matter.

    Computes in float32 or, given any float64, in float64. Differentiable once in every tensor.
    """
    if u.ndim != 3 or K.ndim != 2 or K.shape[0] != u.shape[2] or (D is not None and D.shape != K.shape[:1]):
        got = "None" if D is None else tuple(D.shape)
        raise ValueError(f"fft_conv: expected u (B, L, D), K (D, L) and D (D,), got {tuple(u.shape)}, {tuple(K.shape)} and {got}")
    dtype = torch.float32
    for t in (u, K, D):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return FFT_CONV(u.to(dtype), K[:, : u.shape[1]].to(dtype), None if D is None else D.to(dtype)).to(u.dtype)


# Each backend maps u (B, L, D), K (D, at most L) and D (D,) or None, all of one dtype, to y (B, L, D).


def reference(u: Tensor, K: Tensor, D: Tensor | None) -> Tensor:
    steps = []
    for t in range(u.shape[1]):
        n = min(t + 1, K.shape[1])
        y = (u[:, t + 1 - n : t + 1].flip(1) * K[:, :n].T).sum(1)
        steps.append(y if D is None else y + D * u[:, t])
    return torch.stack(steps, 1) if steps else u


def torch_backend(u: Tensor, K: Tensor, D: Tensor | None) -> Tensor:
    B, L, _ = u.shape
    if not (B and L):
        return u.clone()  # the transform refuses an empty tensor
    n = 2 * L  # room for the whole product: nothing wraps around
    # In a file the length may be any number, and onnxruntime's float32 transform of one with a large prime factor is wrong by 1e-4.
    kind = torch.float64 if exporting() else u.dtype
    product = torch.fft.rfft(u.transpose(1, 2).to(kind), n) * torch.fft.rfft(K.to(kind), n)
    y = torch.fft.irfft(product, n)[..., :L].transpose(1, 2).to(u.dtype)
    return y if D is None else y + D * u


def supports(u: Tensor, K: Tensor, D: Tensor | None) -> str | None:
    reason = native.why_not(u, K, D)
    if reason is None and u.is_cuda and u.shape[1] > LONGEST[u.dtype]:
        return f"on a GPU it takes {LONGEST[u.dtype]} steps of {u.dtype}, which fit into a block's shared memory; torch uses cuFFT"
    return reason


def native_backend(u: Tensor, K: Tensor, D: Tensor | None) -> Tensor:
    return forward_op(u, K, K.new_zeros(K.shape[0]) if D is None else D)


@torch.library.custom_op("lab::fft_conv", mutates_args=())
def forward_op(u: Tensor, K: Tensor, D: Tensor) -> Tensor:
    u, K, D = (t.contiguous() for t in (u, K, D))
    y = torch.empty_like(u)
    native.call("fft_conv", u.dtype, u, K, D, y, *u.shape, K.shape[1], work=50 * u.numel())
    return y


@forward_op.register_fake
def _(u: Tensor, K: Tensor, D: Tensor) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.custom_op("lab::fft_conv_backward", mutates_args=())
def backward_op(gy: Tensor, u: Tensor, K: Tensor, D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gy (B, L, D) -> gradients of u, K, D."""
    gy, u, K, D = (t.contiguous() for t in (gy, u, K, D))
    gu, gK, gD = (torch.empty_like(t) for t in (u, K, D))
    native.call("fft_conv_backward", u.dtype, u, K, D, gy, gu, gK, gD, *u.shape, K.shape[1], work=100 * u.numel())
    return gu, gK, gD


@backward_op.register_fake
def _(gy: Tensor, u: Tensor, K: Tensor, D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gu, gK, gD = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, K, D))
    return gu, gK, gD


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gy: Tensor) -> tuple[Tensor, ...]:
    return backward_op(gy, *ctx.saved_tensors)


differentiable_once("fft_conv", forward_op, backward_op, _save, _backward, twice="torch")


def flops(u: Tensor, K: Tensor, D: Tensor | None) -> float:
    """Three real transforms of twice the length, those of u, K and the product, and the product itself, 6 for two complex numbers."""
    B, L, channels = u.shape
    n, rows = 2 * L, B * channels
    return (2 * rows + len(K)) * of_transform(n) + 6 * rows * (L + 1) + (0 if D is None else 2 * u.numel())


def of_transform(n: int) -> float:
    """A real Fourier transform of n numbers: 5/2 n log2 n, half of a complex one's, which radix 2 would need."""
    return 2.5 * n * math.log2(n) if n > 1 else 0.0


FFT_CONV = Op(
    "fft_conv",
    (
        Backend("native", native_backend, supports=supports),
        Backend("torch", torch_backend),
        Backend("reference", reference),
    ),
    example=lambda: (torch.randn(2, 9, 5), torch.randn(5, 9), torch.randn(5)),
    flops=flops,
)
