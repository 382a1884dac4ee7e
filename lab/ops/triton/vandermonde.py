"""Triton kernels of ssm_kernel, forward and backward: e^{w l} is made where it is used, nothing of size (H, N, L) is stored.

Angles are reduced to one turn in float64: at position 10,000 a float32 angle would be wrong by 1e-3.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power(w_re, w_im, place):
    """e^{w l}: w (R,), place (P,) -> real and imaginary part (R, P)"""
    turns = w_im.to(tl.float64)[:, None] * place.to(tl.float64)[None, :] * 0.15915494309189535
    angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(w_re.dtype)
    size = tl.exp(w_re[:, None] * place.to(w_re.dtype)[None, :])
    return size * tl.cos(angle), size * tl.sin(angle)


@triton.jit
def kernel(w, c, K, N, L, R: tl.constexpr, P: tl.constexpr):
    """K_l = 2 Re sum_n c_n e^{w_n l}: a program has a channel and P positions, and goes through the states by R."""
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * P + tl.arange(0, P)
    total = tl.zeros((P,), dtype=K.dtype.element_ty)
    for first in range(0, N, R):
        n = first + tl.arange(0, R)
        at, real = (row * N + n) * 2, n < N
        e_re, e_im = power(tl.load(w + at, mask=real, other=0.0), tl.load(w + at + 1, mask=real, other=0.0), place)
        c_re, c_im = tl.load(c + at, mask=real, other=0.0), tl.load(c + at + 1, mask=real, other=0.0)
        total += tl.sum(c_re[:, None] * e_re - c_im[:, None] * e_im, 0)
    tl.store(K + row * L + place, 2 * total, mask=place < L)


@triton.jit
def backward(g, w, c, gw, gc, N, L, R: tl.constexpr, P: tl.constexpr):
    """With s = sum_l g_l e^{w l} and m = sum_l l g_l e^{w l}: gc = 2 conj(s), gw = 2 conj(c m). A program has a channel and R states."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * R + tl.arange(0, R)
    at, real = (row * N + n) * 2, n < N
    w_re, w_im = tl.load(w + at, mask=real, other=0.0), tl.load(w + at + 1, mask=real, other=0.0)
    c_re, c_im = tl.load(c + at, mask=real, other=0.0), tl.load(c + at + 1, mask=real, other=0.0)
    s_re, s_im = tl.zeros((R,), dtype=w_re.dtype), tl.zeros((R,), dtype=w_re.dtype)
    m_re, m_im = tl.zeros((R,), dtype=w_re.dtype), tl.zeros((R,), dtype=w_re.dtype)
    for first in range(0, L, P):
        place = first + tl.arange(0, P)
        of_K = tl.load(g + row * L + place, mask=place < L, other=0.0)[None, :]
        e_re, e_im = power(w_re, w_im, place)
        l = place.to(w_re.dtype)[None, :]  # noqa: E741
        s_re += tl.sum(of_K * e_re, 1)
        s_im += tl.sum(of_K * e_im, 1)
        m_re += tl.sum(l * of_K * e_re, 1)
        m_im += tl.sum(l * of_K * e_im, 1)
    tl.store(gc + at, 2 * s_re, mask=real)
    tl.store(gc + at + 1, -2 * s_im, mask=real)
    tl.store(gw + at, 2 * (c_re * m_re - c_im * m_im), mask=real)
    tl.store(gw + at + 1, -2 * (c_re * m_im + c_im * m_re), mask=real)
