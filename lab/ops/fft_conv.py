"""A causal convolution as long as the sequence, by the Fourier transform.      y_t = sum_{s <= t} K_s u_{t - s} + D u_t

B = batch, L = length, D = channels. Padded to twice the length, never circular.

Backends
    torch      the real FFT along time, in float32 at least.
    reference  the formula in a plain loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lab.ops.backend import Backend, Op


def fft_conv(u: Tensor, K: Tensor, D: Tensor | None = None) -> Tensor:
    """u (B, L, D), K (D, L' >= L or shorter), D (D,) or None -> y (B, L, D) in the dtype of u. Positions of K beyond L do not matter."""
    if u.ndim != 3 or K.ndim != 2 or K.shape[0] != u.shape[2] or (D is not None and D.shape != K.shape[:1]):
        got = "None" if D is None else tuple(D.shape)
        raise ValueError(f"fft_conv: expected u (B, L, D), K (D, L) and D (D,), got {tuple(u.shape)}, {tuple(K.shape)} and {got}")
    dtype = torch.promote_types(torch.promote_types(u.dtype, K.dtype), torch.float32)
    x = u.to(dtype)
    y = FFT_CONV(x, K[:, : u.shape[1]].to(dtype))
    return (y if D is None else y + x * D).to(u.dtype)


def reference(u: Tensor, K: Tensor) -> Tensor:
    steps = []
    for t in range(u.shape[1]):
        n = min(t + 1, K.shape[1])
        steps.append((u[:, t + 1 - n : t + 1].flip(1) * K[:, :n].T).sum(1))
    return torch.stack(steps, 1) if steps else u


def torch_backend(u: Tensor, K: Tensor) -> Tensor:
    L = u.shape[1]
    if not L:
        return u.clone()
    n = 2 * L  # room for the whole product: nothing wraps around
    y = torch.fft.irfft(torch.fft.rfft(u.transpose(1, 2), n) * torch.fft.rfft(K, n), n)[..., :L]
    return y.transpose(1, 2)


FFT_CONV = Op(
    "fft_conv",
    (
        Backend("torch", torch_backend),
        Backend("reference", reference),
    ),
    example=lambda: (torch.randn(2, 9, 5), torch.randn(5, 9)),
)
