"""Triton kernels of linear_recurrence and selective_scan, forward and backward.

A program has one row of the batch and a block of channels, W wide, and goes through time in blocks of T steps. Within a block it scans the
pairs (decay, input): (p, x) then (q, y) is (q p, q x + y), an associative rule; the state that enters a block is added with the product of
the decays so far. Steps beyond the end have decay 1 and input 0, so that the last row of a block is the state after its last step.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def follow(p, x, q, y):
    return q * p, q * x + y


@triton.jit
def follow_complex(p, p_im, x, x_im, q, q_im, y, y_im):
    return q * p - q_im * p_im, q * p_im + q_im * p, q * x - q_im * x_im + y, q * x_im + q_im * x + y_im


@triton.jit
def recurrence(
    a, x, h0, h, L, D, PER_STEP: tl.constexpr, COMPLEX: tl.constexpr, T: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """h_t = a_t h_{t-1} + x_t. Complex numbers are pairs: all places count twice."""
    row, channel, step = tl.program_id(0).to(tl.int64), tl.program_id(1) * W + tl.arange(0, W), tl.arange(0, T)
    inside = channel < D
    S: tl.constexpr = 2 if COMPLEX else 1
    at_start = (row * D + channel) * S
    carry = tl.load(h0 + at_start, mask=inside, other=0.0)
    if COMPLEX:
        carry_im = tl.load(h0 + at_start + 1, mask=inside, other=0.0)
    for first in range(0, L, T):
        t = first + step
        real = (t < L)[:, None] & inside[None, :]
        at = ((row * L + t)[:, None] * D + channel[None, :]) * S
        at_a = at if PER_STEP else tl.broadcast_to((channel * S)[None, :], (T, W))
        p, v = tl.load(a + at_a, mask=real, other=1.0), tl.load(x + at, mask=real, other=0.0)
        last = (step == T - 1)[:, None]
        if COMPLEX:
            p_im, v_im = tl.load(a + at_a + 1, mask=real, other=0.0), tl.load(x + at + 1, mask=real, other=0.0)
            p, p_im, v, v_im = tl.associative_scan((p, p_im, v, v_im), 0, follow_complex)
            s = v + p * carry[None, :] - p_im * carry_im[None, :]
            s_im = v_im + p * carry_im[None, :] + p_im * carry[None, :]
            tl.store(h + at, s, mask=real)
            tl.store(h + at + 1, s_im, mask=real)
            carry, carry_im = tl.sum(tl.where(last, s, 0.0), 0), tl.sum(tl.where(last, s_im, 0.0), 0)
        else:
            p, v = tl.associative_scan((p, v), 0, follow)
            s = v + p * carry[None, :]
            tl.store(h + at, s, mask=real)
            carry = tl.sum(tl.where(last, s, 0.0), 0)


@triton.jit
def recurrence_backward(
    grad, a, h, h0, g_x, g_a, g_h0, L, D, PER_STEP: tl.constexpr, COMPLEX: tl.constexpr, T: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """g_t = grad_t + conj(a_{t+1}) g_{t+1}, backwards in time: g_x is g, g_a g_t conj(h_{t-1}) or its sum, g_h0 conj(a_0) g_0."""
    row, channel, step = tl.program_id(0).to(tl.int64), tl.program_id(1) * W + tl.arange(0, W), tl.arange(0, T)
    inside = channel < D
    S: tl.constexpr = 2 if COMPLEX else 1
    at_start = (row * D + channel) * S
    carry = tl.zeros((W,), dtype=h.dtype.element_ty)  # the gradient of the state after a block, by what comes later
    total = tl.zeros((W,), dtype=h.dtype.element_ty)
    if COMPLEX:
        carry_im = tl.zeros((W,), dtype=h.dtype.element_ty)
        total_im = tl.zeros((W,), dtype=h.dtype.element_ty)
    for block in range(0, tl.cdiv(L, T)):
        t = (tl.cdiv(L, T) - 1 - block) * T + step
        real = (t < L)[:, None] & inside[None, :]
        at = ((row * L + t)[:, None] * D + channel[None, :]) * S
        later = (t + 1 < L)[:, None] & inside[None, :]  # the decay that leads on from a step
        at_a = at + D * S if PER_STEP else tl.broadcast_to((channel * S)[None, :], (T, W))
        after_one, start = (t > 0)[:, None] & real, (t == 0)[:, None] & real
        at_h0 = tl.broadcast_to(at_start[None, :], (T, W))
        p, v = tl.load(a + at_a, mask=later, other=1.0), tl.load(grad + at, mask=real, other=0.0)
        b = tl.load(h + at - D * S, mask=after_one, other=0.0) + tl.load(h0 + at_h0, mask=start, other=0.0)  # the state before a step
        first = (step == 0)[:, None]
        if COMPLEX:
            p_im, v_im = -tl.load(a + at_a + 1, mask=later, other=0.0), tl.load(grad + at + 1, mask=real, other=0.0)
            b_im = tl.load(h + at - D * S + 1, mask=after_one, other=0.0) + tl.load(h0 + at_h0 + 1, mask=start, other=0.0)
            p, p_im, v, v_im = tl.associative_scan((p, p_im, v, v_im), 0, follow_complex, reverse=True)
            g = v + p * carry[None, :] - p_im * carry_im[None, :]
            g_im = v_im + p * carry_im[None, :] + p_im * carry[None, :]
            tl.store(g_x + at, g, mask=real)
            tl.store(g_x + at + 1, g_im, mask=real)
            of_a, of_a_im = g * b + g_im * b_im, g_im * b - g * b_im
            if PER_STEP:
                tl.store(g_a + at, of_a, mask=real)
                tl.store(g_a + at + 1, of_a_im, mask=real)
            total += tl.sum(tl.where(real, of_a, 0.0), 0)
            total_im += tl.sum(tl.where(real, of_a_im, 0.0), 0)
            carry, carry_im = tl.sum(tl.where(first, g, 0.0), 0), tl.sum(tl.where(first, g_im, 0.0), 0)
        else:
            p, v = tl.associative_scan((p, v), 0, follow, reverse=True)
            g = v + p * carry[None, :]
            tl.store(g_x + at, g, mask=real)
            of_a = g * b
            if PER_STEP:
                tl.store(g_a + at, of_a, mask=real)
            total += tl.sum(tl.where(real, of_a, 0.0), 0)
            carry = tl.sum(tl.where(first, g, 0.0), 0)
    at_a = row * L * D * S + channel * S if PER_STEP else channel * S
    p = tl.load(a + at_a, mask=inside, other=0.0)
    if COMPLEX:
        p_im = -tl.load(a + at_a + 1, mask=inside, other=0.0)
        tl.store(g_h0 + at_start, p * carry - p_im * carry_im, mask=inside)
        tl.store(g_h0 + at_start + 1, p * carry_im + p_im * carry, mask=inside)
        if not PER_STEP:
            tl.store(g_a + at_start, total, mask=inside)
            tl.store(g_a + at_start + 1, total_im, mask=inside)
    else:
        tl.store(g_h0 + at_start, p * carry, mask=inside)
        if not PER_STEP:
            tl.store(g_a + at_start, total, mask=inside)


@triton.jit
def selective(
    u, dt, A, B, C, D, h0, y, last, starts, L, E, N, KEEP: tl.constexpr, T: tl.constexpr, W: tl.constexpr, STATES: tl.constexpr
):  # fmt: skip
    """h_t = e^{dt_t A} h_{t-1} + (dt_t u_t) B_t, y_t = C_t . h_t + D u_t. STATES: N or the next power of 2."""
    row, channel, step = tl.program_id(0).to(tl.int64), tl.program_id(1) * W + tl.arange(0, W), tl.arange(0, T)
    n = tl.arange(0, STATES)
    inside, is_state = channel < E, n < N
    both = inside[:, None] & is_state[None, :]
    at_A = channel[:, None] * N + n[None, :]
    rate = tl.load(A + at_A, mask=both, other=0.0)
    skip = tl.load(D + channel, mask=inside, other=0.0)
    carry = tl.load(h0 + row * E * N + at_A, mask=both, other=0.0)  # (W, STATES)
    blocks = tl.cdiv(L, T)
    for block in range(0, blocks):
        if KEEP:
            tl.store(starts + (row * blocks + block) * E * N + at_A, carry, mask=both)
        t = block * T + step
        real = (t < L)[:, None] & inside[None, :]
        at = (row * L + t)[:, None] * E + channel[None, :]
        at_n = (row * L + t)[:, None] * N + n[None, :]
        mask_n = (t < L)[:, None] & is_state[None, :]
        v, d = tl.load(u + at, mask=real, other=0.0), tl.load(dt + at, mask=real, other=0.0)
        b, c = tl.load(B + at_n, mask=mask_n, other=0.0), tl.load(C + at_n, mask=mask_n, other=0.0)
        p = tl.exp(d[:, :, None] * rate[None, :, :])  # (T, W, STATES)
        p, s = tl.associative_scan((p, (d * v)[:, :, None] * b[:, None, :]), 0, follow)
        s += p * carry[None, :, :]
        tl.store(y + at, tl.sum(s * c[:, None, :], 2) + skip[None, :] * v, mask=real)
        carry = tl.sum(tl.where((step == T - 1)[:, None, None], s, 0.0), 0)
    tl.store(last + row * E * N + at_A, carry, mask=both)


@triton.jit
def selective_backward(
    gy, glast, u, dt, A, B, C, D, starts, gu, gdt, gA, gB, gC, gh0, batch, L, E, N, T: tl.constexpr, W: tl.constexpr, STATES: tl.constexpr
):  # fmt: skip
    """Each block, from the last: its states again, from the one that was kept, then their gradients
    g_t = gy_t C_t + e^{dt_{t+1} A} g_{t+1}.

    gA and gh0 are of a row, (Bt, E, N); gB and gC of a block of channels, (blocks of channels, Bt, L, N).
    """
    row, part, step = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, T)
    channel, n = tl.program_id(1) * W + tl.arange(0, W), tl.arange(0, STATES)
    inside, is_state = channel < E, n < N
    both = inside[:, None] & is_state[None, :]
    at_A = channel[:, None] * N + n[None, :]
    rate = tl.load(A + at_A, mask=both, other=0.0)
    skip = tl.load(D + channel, mask=inside, other=0.0)
    carry = tl.load(glast + row * E * N + at_A, mask=both, other=0.0)  # the gradient of the state after a block
    of_A = tl.zeros((W, STATES), dtype=u.dtype.element_ty)
    blocks = tl.cdiv(L, T)
    for i in range(0, blocks):
        block = blocks - 1 - i
        t = block * T + step
        real = (t < L)[:, None] & inside[None, :]
        at = (row * L + t)[:, None] * E + channel[None, :]
        at_n = (row * L + t)[:, None] * N + n[None, :]
        mask_n = (t < L)[:, None] & is_state[None, :]
        v, d = tl.load(u + at, mask=real, other=0.0), tl.load(dt + at, mask=real, other=0.0)
        b, c = tl.load(B + at_n, mask=mask_n, other=0.0), tl.load(C + at_n, mask=mask_n, other=0.0)
        decay, x = tl.exp(d[:, :, None] * rate[None, :, :]), d * v
        # The states before each step: the same scan, one step late.
        earlier = (step > 0)[:, None] & real
        v1, d1 = tl.load(u + at - E, mask=earlier, other=0.0), tl.load(dt + at - E, mask=earlier, other=0.0)
        b1 = tl.load(B + at_n - N, mask=(step > 0)[:, None] & mask_n, other=0.0)
        p, h = tl.associative_scan((tl.exp(d1[:, :, None] * rate[None, :, :]), (d1 * v1)[:, :, None] * b1[:, None, :]), 0, follow)
        start = tl.load(starts + (row * blocks + block) * E * N + at_A, mask=both, other=0.0)
        faded = decay * (h + p * start[None, :, :])  # e^{dt_t A} h_{t-1}
        h = faded + x[:, :, None] * b[:, None, :]
        # The gradients of the states: the decay of the next step leads back to this one.
        d2 = tl.load(dt + at + E, mask=(step < T - 1)[:, None] & (t + 1 < L)[:, None] & inside[None, :], other=0.0)
        of_y = tl.load(gy + at, mask=real, other=0.0)
        p, g = tl.associative_scan(
            (tl.exp(d2[:, :, None] * rate[None, :, :]), of_y[:, :, None] * c[:, None, :]), 0, follow, reverse=True
        )  # fmt: skip
        g += p * carry[None, :, :]
        through = g * faded  # the gradient of dt_t A
        of_x = tl.sum(g * b[:, None, :], 2)
        tl.store(gu + at, of_x * d + skip[None, :] * of_y, mask=real)
        tl.store(gdt + at, of_x * v + tl.sum(through * rate[None, :, :], 2), mask=real)
        at_part = ((part * batch + row) * L + t)[:, None] * N + n[None, :]
        tl.store(gB + at_part, tl.sum(g * x[:, :, None], 1), mask=mask_n)
        tl.store(gC + at_part, tl.sum(of_y[:, :, None] * h, 1), mask=mask_n)
        of_A += tl.sum(through * d[:, :, None], 0)
        carry = tl.sum(tl.where((step == 0)[:, None, None], decay * g, 0.0), 0)
    tl.store(gA + row * E * N + at_A, of_A, mask=both)
    tl.store(gh0 + row * E * N + at_A, carry, mask=both)
