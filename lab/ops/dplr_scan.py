"""A recurrence whose matrix is diagonal plus low rank, per channel.      h_t = A' h_{t-1} + b u_t,   y_t = 2 Re(C . h_t)

    A' h = h + d h - sum_j right_j dot(left_j, h),   dot(a, h) = 2 Re sum_n a_n h_n over one of each pair of conjugates

B = batch, L = length, D = channels, n = pairs, r = rank, 1 or more; complex numbers as pairs (..., 2). No power of A' must grow. A' - I is
given rather than A', as it is small where the time step is: 1 + d would lose its digits. This is S4's state space as a recurrence
(arXiv:2111.00396, appendix C.3), O(n r) for a token and channel.

Backends
    native     C++, the states of WIDTH channels side by side, and CUDA, a few states of a channel in a thread. Those inside a chunk are
               computed again in the backward pass (csrc/*/dplr_scan*).
    torch      chunks of 64 tokens as matrix products, the powers of A' by squaring. While exporting, a loop of free length.
    reference  the formula in a plain loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.ops import native
from lab.ops.backend import Backend, Op, differentiable_once, exporting, without_autocast
from lab.ops.complex import conjugate, dot, multiply

CHUNK = 6  # log2 of the tokens in a chunk of the torch backend
MOST_PAIRS, HIGHEST_RANK = {torch.float32: 512, torch.float64: 256}, 4  # that csrc/cuda/dplr_scan.cu takes


def dplr_scan(
    u: Tensor, h0: Tensor | None, d: Tensor, right: Tensor, left: Tensor, b: Tensor, C: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """u (B, L, D), h0 (B, D, n, 2) or None for zeros, d, b, C (D, n, 2), right, left (r, D, n, 2) -> y (B, L, D), last (B, D, n, 2).

    last is the state after the last real token, number lengths[b] (B,); without lengths, number L; with none, h0. y of padding has no
    meaning. Computes in float32 or, given any float64, in float64. Differentiable once in every tensor.
    """
    B, _, D = u.shape if u.ndim == 3 else (0, 0, 0)
    state, low = (B, *d.shape), (right.shape[0], *d.shape)
    if (
        u.ndim != 3 or d.ndim != 3 or d.shape[::2] != (D, 2) or b.shape != d.shape or C.shape != d.shape or right.shape != low
        or left.shape != low or not len(left) or (h0 is not None and h0.shape != state)
    ):  # fmt: skip
        got = ", ".join("None" if t is None else str(tuple(t.shape)) for t in (u, h0, d, right, left, b, C))
        raise ValueError(f"dplr_scan: expected u (B, L, D), h0 (B, D, n, 2), d, b, C (D, n, 2), right, left (r, D, n, 2); got {got}")
    dtype = torch.float32
    for t in (u, h0, d, right, left, b, C):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    start = u.new_zeros(state, dtype=dtype) if h0 is None else h0.to(dtype)
    ends = None if lengths is None else lengths.to(u.device)
    return DPLR_SCAN(u.to(dtype), start, *(t.to(dtype) for t in (d, right, left, b, C)), ends)


def step(h: Tensor, u: Tensor, d: Tensor, right: Tensor, left: Tensor, b: Tensor) -> Tensor:
    """h (B, D, n, 2), u (B, D) -> the next h."""
    after = h + multiply(d, h) + b * u[:, :, None, None]
    for j in range(right.shape[0]):
        after = after - right[j] * dot(left[j], h)
    return after


# Each backend maps u (B, L, D), h0 (B, D, n, 2), d, right, left, b, C, all of one dtype, and lengths (B,) or None to y and last.


def reference(
    u: Tensor, h0: Tensor, d: Tensor, right: Tensor, left: Tensor, b: Tensor, C: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    h, y, last = h0, [], h0
    for t in range(u.shape[1]):
        h = step(h, u[:, t], d, right, left, b)
        y.append(dot(C, h)[..., 0, 0])
        last = h if lengths is None else torch.where((lengths > t)[:, None, None, None], h, last)
    return torch.stack(y, 1) if y else u, last


def torch_backend(
    u: Tensor, h0: Tensor, d: Tensor, right: Tensor, left: Tensor, b: Tensor, C: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    if u.shape[1] == 1:
        return reference(u, h0, d, right, left, b, C, lengths)
    if exporting():
        return exported(u, h0, d, right, left, b, C)
    with without_autocast(u):
        return chunked(u, h0, d, right, left, b, C, lengths)


def matrix(d: Tensor, right: Tensor, left: Tensor) -> Tensor:
    """A' - I as real matrices (D, 2n, 2n) of (re, im) side by side."""
    d_re, d_im = d.unbind(-1)
    blocks = torch.stack([torch.stack([d_re, d_im], -1), torch.stack([-d_im, d_re], -1)])  # (from, D, n, to)
    diagonal = torch.diag_embed(blocks.permute(1, 3, 0, 2)).permute(0, 3, 1, 4, 2).flatten(3).flatten(1, 2)
    return diagonal - right.flatten(2).permute(1, 2, 0) @ (2 * conjugate(left)).flatten(2).transpose(0, 1)


def chunked(
    u: Tensor, h0: Tensor, d: Tensor, right: Tensor, left: Tensor, b: Tensor, C: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """With M = 2^m tokens in a chunk: X = [A'^j b], Y = [C A'^(j+1)], the kernel inside a chunk as a matrix, the states before the chunks
    by doubling."""
    (B, L, D), n = u.shape, d.shape[1]
    if not L:
        return u, h0
    m = min(CHUNK, (L - 1).bit_length())
    M = 1 << m
    count = -(-L // M)
    E = [matrix(d, right, left)]  # E[i] = A'^(2^i) - I;  (I + E)^2 - I = 2 E + E^2
    while len(E) < m + count.bit_length() + 1:
        E.append(torch.baddbmm(E[-1], E[-1], E[-1], beta=2))

    row = (2 * conjugate(C)).flatten(1)[:, None]  # (D, 1, 2n)
    X, Y = b.flatten(1)[..., None], row + row @ E[0]
    for power in E[:m]:
        X = torch.cat([X, X + power @ X], -1)  # (D, 2n, M)
        Y = torch.cat([Y, Y + Y @ power], 1)  # (D, M, 2n)
    kernel = F.pad((row @ X)[:, 0], (M, 0))  # zeros before the token itself
    lag = torch.arange(M, device=u.device)
    inside = kernel[:, M + lag[:, None] - lag]  # (D, to, from)

    v = F.pad(u, (0, 0, 0, count * M - L)).view(B, count, M, D).permute(3, 2, 0, 1)  # (D, M, B, chunks)
    ends = (X.flip(-1) @ v.flatten(2)).unflatten(-1, (B, count))  # what each chunk alone leaves behind
    before = torch.cat([h0.flatten(2).permute(1, 2, 0)[..., None], ends], -1)  # (D, 2n, B, chunks + 1)
    for i in range(count.bit_length()):
        span = 1 << i
        earlier = before[..., :-span]
        later = before[..., span:] + earlier + (E[m + i] @ earlier.flatten(2)).view_as(earlier)
        before = torch.cat([before[..., :span], later], -1)
    y = inside @ v.flatten(2) + Y @ before[..., :-1].flatten(2)
    y = y.unflatten(-1, (B, count)).permute(2, 3, 1, 0).flatten(1, 2)[:, :L]

    length = torch.full((B,), L, device=u.device) if lengths is None else lengths.long()
    whole, rest = length // M, length % M
    last = before.gather(-1, whole[:, None].expand(D, 2 * n, B, 1))[..., 0]  # before the chunk in which the row ends
    for i in range(m):
        last = last + (E[i] @ last) * (rest >> i & 1)
    place = length[:, None] - 1 - lag  # the tokens of that chunk, the last first
    tail = u.gather(1, place.clamp(min=0)[..., None].expand(-1, -1, D)) * (lag < rest[:, None])[..., None]
    last = last + X @ tail.permute(2, 1, 0)
    return y, last.permute(2, 0, 1).unflatten(-1, (n, 2))


def exported(u: Tensor, h0: Tensor, d: Tensor, right: Tensor, left: Tensor, b: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """In operators that an exported file can hold: a loop whose length is an input. Under torch.no_grad()."""
    inputs, h0 = u.transpose(0, 1), h0.contiguous()
    if torch.jit.is_tracing():
        y, last = scripted_loop()(inputs, h0, d, right, left, b, C)
        return y.transpose(0, 1), last
    from torch._higher_order_ops import scan  # private, so not needed by anything but an export

    def token(h: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        h = step(h, now, d, right, left, b)
        return h, dot(C, h)[..., 0, 0]

    last, y = scan(token, h0, inputs)
    return y.transpose(0, 1), last


def loop(u: Tensor, h: Tensor, d: Tensor, right: Tensor, left: Tensor, b: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    y = [u[0]]
    for t in range(u.shape[0]):
        h = step(h, u[t], d, right, left, b)
        y.append(dot(C, h)[..., 0, 0])
    return torch.stack(y)[1:], h


@cache
def scripted_loop() -> Callable[..., tuple[Tensor, Tensor]]:
    """TorchScript's tracer would unroll a Python loop; a scripted one it keeps. Compiled here at the first such export."""
    return torch.jit.script(loop)


def supports(u: Tensor, h0: Tensor, d: Tensor, right: Tensor, left: Tensor, b: Tensor, C: Tensor, lengths: Tensor | None) -> str | None:
    reason = native.why_not(u, h0, d, right, left, b, C)
    if reason is None and u.is_cuda and (d.shape[1] > MOST_PAIRS[u.dtype] or len(right) > HIGHEST_RANK):
        return f"on a GPU it takes {MOST_PAIRS[u.dtype]} pairs of {u.dtype} and rank {HIGHEST_RANK}, which fit into a block"
    return reason


def native_starts(u: Tensor, n: int) -> Tensor | None:
    """Memory for the CUDA kernel's backward pass, which keeps the state of every 16th step. The C++ kernel, in vectors wider than 1, keeps
    those of one tile at a time, by itself."""
    B, L, D = u.shape
    return u.new_empty(B, D, -(-L // 16), n, 2) if native.width(u) == 1 else None


def native_backend(
    u: Tensor, h0: Tensor, d: Tensor, right: Tensor, left: Tensor, b: Tensor, C: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    ends = u.new_full((u.shape[0],), u.shape[1]) if lengths is None else lengths.to(u.dtype)
    return forward_op(u, h0, d, right, left, b, C, ends)


@torch.library.custom_op("lab::dplr_scan", mutates_args=())
def forward_op(u: Tensor, h0: Tensor, d: Tensor, right: Tensor, left: Tensor, b: Tensor, C: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """ends: the lengths, as numbers of the dtype of u."""
    args = [t.contiguous() for t in (u, h0, d, right, left, b, C, ends)]
    y, last = torch.empty_like(args[0]), torch.empty_like(args[1])
    sizes = *u.shape, d.shape[1], right.shape[0]
    native.call("dplr_scan", u.dtype, *args, y, last, *sizes, work=u.numel() * d.shape[1] * 16)
    return y, last


@forward_op.register_fake
def _(u: Tensor, h0: Tensor, d: Tensor, right: Tensor, left: Tensor, b: Tensor, C: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, h0))  # type: ignore[return-value]


@torch.library.custom_op("lab::dplr_scan_backward", mutates_args=())
def backward_op(
    gy: Tensor, glast: Tensor, u: Tensor, h0: Tensor, d: Tensor, right: Tensor, left: Tensor, b: Tensor, C: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, h0, d, right, left, b, C."""
    args = [t.contiguous() for t in (gy, glast, u, h0, d, right, left, b, C, ends)]
    B = u.shape[0]
    gu, gh0 = torch.empty_like(args[2]), torch.empty_like(args[3])
    shared = [u.new_empty(B, *t.shape) for t in (d, right, left, b, C)]  # one for each row
    sizes = *u.shape, d.shape[1], right.shape[0]
    starts = native_starts(u, d.shape[1])
    native.call("dplr_scan_backward", u.dtype, *args, starts, gu, gh0, *shared, *sizes, work=u.numel() * d.shape[1] * 80)
    return gu, gh0, *(g.sum(0) for g in shared)  # type: ignore[return-value]


@backward_op.register_fake
def _(
    gy: Tensor, glast: Tensor, u: Tensor, h0: Tensor, d: Tensor, right: Tensor, left: Tensor, b: Tensor, C: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, h0, d, right, left, b, C))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gy: Tensor, glast: Tensor) -> tuple[Tensor | None, ...]:
    return *backward_op(gy, glast, *ctx.saved_tensors), None


def _example() -> tuple[Any, ...]:
    low, state = (1, 5, 3, 2), (5, 3, 2)
    matrices = -torch.rand(state), 0.1 * torch.randn(low), 0.1 * torch.randn(low), torch.randn(state), torch.randn(state)
    return torch.randn(2, 9, 5), torch.randn(2, *state), *matrices, None


differentiable_once("dplr_scan", forward_op, backward_op, _save, _backward, twice="torch")


def flops(
    u: Tensor, h0: Tensor, d: Tensor, right: Tensor, left: Tensor, b: Tensor, C: Tensor, lengths: Tensor | None
) -> float:  # fmt: skip
    """The recurrence, for a token and pair: 8 of h + d h, 4 of b u, 4 of C . h, and 8 of each rank."""
    return u.numel() * d.shape[1] * (16 + 8 * len(right))


DPLR_SCAN = Op(
    "dplr_scan",
    (
        Backend("native", native_backend, supports=supports),
        Backend("torch", torch_backend),
        Backend("reference", reference),
    ),
    example=_example,
    flops=flops,
)
