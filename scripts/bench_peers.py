"""Other ways to compute what the ops compute: installed packages, imported when they are called, and plain PyTorch, written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


def mambapy_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from mambapy.mamba import MambaBlock

    return MambaBlock.selective_scan(None, u, dt, A, B, C, D)


def selecting_loop(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The published reference: all decays first, then a loop that selects time steps; its backward pass grows with L^2."""
    decay, x = torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None]
    h, steps = torch.zeros_like(decay[:, 0]), []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + x[:, t]
        steps.append((h * C[:, t, None]).sum(-1))
    return torch.stack(steps, 1) + u * D


def sixteen_steps(h: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    steps = []
    for x, d, b, c in zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        h = torch.exp(d[..., None] * A) * h + (d * x)[..., None] * b[:, None]
        steps.append((h * c[:, None]).sum(-1))
    return torch.stack(steps, 1), h


@cache
def compiled_steps() -> Callable[..., tuple[Tensor, Tensor]]:
    from torch._dynamo import config as tracer
    from torch._inductor import config as compiler

    compiler.compile_threads = 1  # the benchmark forks, and a forked process would wait for ever for the compiler's workers
    tracer.recompile_limit = 64  # a graph for each shape, with gradients and without, of the first chunk and of the others
    return torch.compile(sixteen_steps, fullgraph=True, dynamic=False)


def compiled_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    h, chunks = u.new_zeros(u.shape[0], *A.shape), []
    for parts in zip(*(t.split(16, 1) for t in (u, dt, B, C)), strict=True):
        y, h = compiled_steps()(h, parts[0], parts[1], A, parts[2], parts[3])
        chunks.append(y)
    return torch.cat(chunks, 1) + u * D


def s5_scan(a: Tensor, x: Tensor) -> Tensor:
    from s5.jax_compat import associative_scan
    from s5.s5_model import binary_operator

    decays = a.expand(x.shape[1:])
    return torch.stack([associative_scan(binary_operator, (decays, row))[1] for row in x])


def plain_loop(a: Tensor, x: Tensor) -> Tensor:
    h, steps = torch.zeros_like(x[:, 0]), []
    for now in x.unbind(1):
        h = a * h + now
        steps.append(h)
    return torch.stack(steps, 1)


def by_fft(a: Tensor, x: Tensor) -> Tensor:
    return padded_fft(x, a[:, None] ** torch.arange(x.shape[1]))


def by_matmul(a: Tensor, x: Tensor, chunk: int = 64) -> Tensor:
    """Inside a chunk a lower triangular matrix of powers for each channel, from chunk to chunk a loop."""
    place = torch.arange(chunk)
    powers = (a[:, None, None] ** (place[:, None] - place).clamp(min=0)).tril()  # (D, chunk, chunk)
    inside = torch.einsum("dij,bnjd->bnid", powers, x.unflatten(1, (-1, chunk)))
    onward, h, chunks = a ** (place + 1)[:, None], torch.zeros_like(x[:, 0]), []
    for part in inside.unbind(1):
        part = part + onward * h[:, None]
        h = part[:, -1]
        chunks.append(part)
    return torch.cat(chunks, 1)


def laminarnet_scan(a: Tensor, x: Tensor, chunk: int = 256) -> Tensor:
    """As laminarnet 0.7.11 computes it: sums of x_t / (a_0 .. a_t), the exponents clamped at -20; not exact."""
    B, L, D = x.shape
    logs = a.log().view(B, -1, chunk, D).cumsum(2).clamp(-20.0, 0.0)
    top = logs.amax(2, keepdim=True)
    inside = torch.exp(logs - top) * torch.cumsum(torch.exp(top - logs) * x.view(B, -1, chunk, D), 2)
    total = logs[:, :, -1].cumsum(1).clamp(-80.0, 0.0)
    total = (total - total.amax(1, keepdim=True)).clamp(-20.0, 0.0)
    seeds = F.pad((inside[:, :, -1] * torch.exp(-total))[:, :-1], (0, 0, 1, 0)).cumsum(1)
    return (inside + (seeds * torch.exp(total))[:, :, None] * torch.exp(logs)).view(B, L, D)


def public_kernel(w: Tensor, c: Tensor, length: int) -> Tensor:
    """As the public s4d.py computes it."""
    powers = torch.exp(torch.view_as_complex(w)[..., None] * torch.arange(length))
    return 2 * torch.einsum("hn,hnl->hl", torch.view_as_complex(c), powers).real


def public_s4d(
    u: Tensor, log_dt: Tensor, log_A_re: Tensor, A_im: Tensor, C: Tensor, D: Tensor, out_weight: Tensor, out_bias: Tensor
) -> Tensor:
    """The layer of the public s4d.py, channels first inside, u (B, L, D) -> the same shape; lab's parameters."""
    dt, A, x = log_dt.exp(), torch.complex(-log_A_re.exp(), A_im), u.transpose(1, 2)
    w = A * dt[:, None]
    c = torch.view_as_complex(C[0]) * (torch.exp(w) - 1) / A
    K = public_kernel(torch.view_as_real(w), torch.view_as_real(c), u.shape[1])
    y = padded_fft(u, K).transpose(1, 2) + x * D[:, None]
    return F.glu(F.conv1d(F.gelu(y), out_weight[..., None], out_bias), 1).transpose(1, 2)


def public_cauchy(w: Tensor, v: Tensor, length: int) -> Tensor:
    """As the public s4.py computes the sums without its extension: both of each pair, all poles at all points at once."""
    z = torch.exp(-2j * math.pi * torch.arange(length // 2 + 1, dtype=torch.float64) / length)
    w, v = (torch.cat([t, t.conj()], -1) for t in (torch.view_as_complex(w), torch.view_as_complex(v)))
    turn = torch.exp(-0.5j * z.angle())  # 1 + z = 2 c / turn: times 2 / turn nothing is infinite where z = -1
    one, other = ((1 - z) * turn / 2).to(v.dtype), ((1 + z) * turn / 2).to(v.dtype)
    return torch.view_as_real((v[..., None] / (one - other * w[:, None, :, None])).sum(-2))


def public_s4(
    u: Tensor, log_dt: Tensor, log_A_re: Tensor, A_im: Tensor, P: Tensor, B: Tensor, C: Tensor, D: Tensor, out_weight: Tensor,
    out_bias: Tensor,
) -> Tensor:  # fmt: skip
    """The layer of the public s4.py with rank 1, u (B, L, D) -> the same shape; lab's parameters. The public one learns C (I - A'^L) for
    one L: lab's time for that is in both."""
    from lab.layers.dplr import Dplr
    from lab.ops.complex import conjugate, multiply

    L, dt = u.shape[1], log_dt.exp()[:, None]
    lab = Dplr(torch.stack([-log_A_re.exp(), A_im], -1), P, B, dt)
    cut, half = lab.cut(C.double(), L).float()[0], dt[..., None] / 2
    w, P, B = half * torch.stack([-log_A_re.exp(), A_im], -1), half.sqrt() * P[0], half * B
    pairs = [multiply(a, b) for a in (cut, conjugate(P)) for b in (B, P)]
    q00, q01, q10, q11 = torch.view_as_complex(public_cauchy(w, torch.stack(pairs, 1), L)).unbind(1)
    turn = torch.polar(torch.ones(L // 2 + 1), math.pi / L * torch.arange(L // 2 + 1))
    K = torch.fft.irfft(turn * (q00 - turn.real * q01 * q10 / (1 + turn.real * q11)), L)
    y = padded_fft(u, K).transpose(1, 2) + u.transpose(1, 2) * D[:, None]
    return F.glu(F.conv1d(F.gelu(y), out_weight[..., None], out_bias), 1).transpose(1, 2)


def padded_fft(u: Tensor, K: Tensor) -> Tensor:
    L = u.shape[1]
    return torch.fft.irfft(torch.fft.rfft(u.transpose(1, 2), 2 * L) * torch.fft.rfft(K, 2 * L), 2 * L)[..., :L].transpose(1, 2)


def conv1d(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """x (B, D, L)"""
    return F.conv1d(x, w.T[:, None], bias, padding=w.shape[0] - 1, groups=x.shape[1])[..., : x.shape[2]]
