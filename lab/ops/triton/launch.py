"""When the Triton kernels can run, and the functions that launch them: tensors in, tensors out, the grid and the blocks chosen here.

The scans walk through time in blocks of BLOCK steps and scan a block at once; channels stand side by side. Names and shapes are those
of the ops.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from lab.ops.backend import exporting

INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton reads it once too, when it is imported
BLOCK = 16  # steps that are scanned at once
ELEMENTS = 2048  # of a block, numbers that a program holds side by side


def why_not(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> str | None:
    """The reason why the kernels cannot compute with these tensors, or None."""
    if not INSTALLED:
        return "the package triton is not installed (torch for CUDA brings it; else pip install lab[gpu])"
    if exporting():
        return "an exported file must run without lab's kernels"
    for t in tensors:
        if t.device.type != "cuda" and not (INTERPRETED and t.device.type == "cpu"):
            return f"a tensor is on {t.device}, Triton computes on a GPU (TRITON_INTERPRET=1 simulates one)"
        if t.device != tensors[0].device:
            return f"its tensors are on {tensors[0].device} and {t.device}"
    if tensors[0].dtype not in dtypes:
        return f"{tensors[0].dtype} is not among {', '.join(map(str, dtypes))}"
    return None


def power_of_2(n: int) -> int:
    """The first one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def dense(*tensors: Tensor) -> list[Tensor]:
    """As the kernels read them: contiguous, complex numbers as pairs."""
    plain = (t.resolve_conj().contiguous() for t in tensors)
    return [torch.view_as_real(t) if t.is_complex() else t for t in plain]


# linear_recurrence


def linear_recurrence(a: Tensor, x: Tensor, h0: Tensor) -> Tensor:
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return h
    from lab.ops.triton import scans

    (B, L, D), W = x.shape, _columns(x.shape[2])
    with torch.cuda.device_of(x):
        scans.recurrence[(B, -(-D // W))](*dense(a, x, h0, h), L, D, a.ndim == 3, x.is_complex(), BLOCK, W)
    return h


def linear_recurrence_backward(grad: Tensor, a: Tensor, h: Tensor, h0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (B, L, D), per_step = h.shape, a.ndim == 3
    g_x = torch.empty_like(h, memory_format=torch.contiguous_format)
    g_a, g_h0 = g_x.new_empty((B, L, D) if per_step else (B, D)), g_x.new_empty(B, D)
    if not h.numel():
        return (g_a if per_step else g_a.zero_().sum(0)), g_x, g_h0.zero_()
    from lab.ops.triton import scans

    W = _columns(D)
    with torch.cuda.device_of(h):
        scans.recurrence_backward[(B, -(-D // W))](
            *dense(grad, a, h, h0, g_x, g_a, g_h0), L, D, per_step, h.is_complex(), BLOCK, W
        )  # fmt: skip
    return (g_a if per_step else g_a.sum(0)), g_x, g_h0


def _columns(D: int) -> int:
    return min(power_of_2(D), ELEMENTS // BLOCK // 4)


# selective_scan


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, last, and, to keep, the state before each block, (Bt, ceil(L / BLOCK), E, N)."""
    (Bt, L, E), N = u.shape, A.shape[1]
    y, last = torch.empty_like(u, memory_format=torch.contiguous_format), torch.empty_like(h0, memory_format=torch.contiguous_format)
    starts = u.new_empty(scan_starts(u, N) if keep else 0)
    if not h0.numel():
        return y, last, starts
    from lab.ops.triton import scans

    states = power_of_2(N)
    W = _channels(E, states)
    with torch.cuda.device_of(u):
        scans.selective[(Bt, -(-E // W))](*dense(u, dt, A, B, C, D, h0, y, last, starts), L, E, N, keep, BLOCK, W, states)
    return y, last, starts


def scan_starts(u: Tensor, N: int) -> tuple[int, ...]:
    Bt, L, E = u.shape
    return Bt, -(-L // BLOCK), E, N


def selective_scan_backward(
    gy: Tensor, glast: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor
) -> list[Tensor]:
    (Bt, L, E), N = u.shape, A.shape[1]
    if starts.shape != scan_starts(u, N):  # the kernel would read beyond its end
        raise ValueError(f"selective_scan: the saved states must be {scan_starts(u, N)}, got {tuple(starts.shape)}")
    states = power_of_2(N)
    W = _channels(E, states)
    blocks = -(-E // W)
    gu, gdt = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, dt))
    gA, gh0 = u.new_empty(Bt, E, N), u.new_empty(Bt, E, N)
    gB, gC = u.new_empty(blocks, Bt, L, N), u.new_empty(blocks, Bt, L, N)  # a part of each block of channels: sums in a fixed order
    if glast.numel():
        from lab.ops.triton import scans

        grads = (gu, gdt, gA, gB, gC, gh0)
        with torch.cuda.device_of(u):
            scans.selective_backward[(Bt, blocks)](
                *dense(gy, glast, u, dt, A, B, C, D, starts, *grads), Bt, L, E, N, BLOCK, W, states
            )  # fmt: skip
    return [gu, gdt, gA.sum(0), gB.sum(0), gC.sum(0), (gy * u).sum((0, 1)), gh0]


def _channels(E: int, states: int) -> int:
    return max(1, min(power_of_2(E), ELEMENTS // BLOCK // states))


# ssm_kernel

ROWS, PLACES = 16, 64  # states and positions in a block


def ssm_kernel(w: Tensor, c: Tensor, length: int) -> Tensor:
    (H, N, _), K = w.shape, w.new_empty(w.shape[0], length)
    if not K.numel():
        return K
    from lab.ops.triton import vandermonde

    with torch.cuda.device_of(w):
        vandermonde.kernel[(H, -(-length // PLACES))](*dense(w, c, K), N, length, ROWS, PLACES)
    return K


def ssm_kernel_backward(g: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (H, N, _), length = w.shape, g.shape[1]
    gw, gc = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (w, c))
    if not w.numel():
        return gw, gc
    from lab.ops.triton import vandermonde

    with torch.cuda.device_of(w):
        vandermonde.backward[(H, -(-N // ROWS))](*dense(g, w, c, gw, gc), N, length, ROWS, PLACES)
    return gw, gc
