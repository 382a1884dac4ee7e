"""Kuramoto oscillators over time: coupled phases with a drive per step.

    theta_{t+1} = wrap(theta_t + dt [omega + u_t + kappa * F(theta_t)]),   F_i(theta) = sum_j W_ij sin(theta_j - theta_i)

B = batch, L = length, H = oscillators. wrap takes the remainder modulo 2 pi, up to rounding. The drive u enters like a change of the
natural frequency omega. Nonlinear in theta, hence sequential in t. Source: Kuramoto (1975), by explicit Euler.

Backends
    native     C++, four rows at a time (csrc/cpu/kuramoto_scan.cpp); CUDA, a thread for each oscillator.
    torch      one opaque operator with a hand-written gradient: a compiled graph sees one node. While exporting, a loop of free length.
    reference  the formula in a plain loop.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.ops import native
from lab.ops.backend import Backend, Op, differentiable_once, exporting

TWO_PI = 2 * math.pi
WRAP_EVERY = 16  # steps; between two wraps a phase stays small enough for float32


def kuramoto_scan(
    theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """theta0 (B, H) or (H,), drive u (B, L, H), omega (H,), kappa (H,), W (H, H) -> theta (B, L, H) before each drive, last (B, H).

    theta[:, 0] is theta0. last is the phase after the drive of the last real token, which is number lengths[b] (B,); without lengths,
    number L. A drive of batch 1 with lengths (B,) gives last (B, H). Computes in float32 or, given any float64, in float64.
    Differentiable once in every tensor.
    """
    B, H = drive.shape[0], drive.shape[-1]
    got = [tuple(t.shape) for t in (theta0, omega, kappa, W)]
    start = (H,) if theta0.ndim == 1 else (B, H)  # comparing with both would compare B to H, and an exported graph would refuse B = H
    if drive.ndim != 3 or got != [start, (H,), (H,), (H, H)]:
        raise ValueError(
            "kuramoto_scan: expected drive (B, L, H) and theta0 (B, H) or (H,), omega (H,), kappa (H,), W (H, H); "
            f"got {tuple(drive.shape)} and {', '.join(map(str, got))}"
        )
    dtype = torch.float32
    for t in (theta0, drive, omega, kappa, W):
        dtype = torch.promote_types(dtype, t.dtype)
    theta0, drive, omega, kappa, W = (t.to(dtype) for t in (theta0, drive, omega, kappa, W))
    phases = KURAMOTO_SCAN(theta0.expand(B, H), drive, omega, kappa, W, dt)
    theta = phases[:, :-1]
    if lengths is None:
        return theta, phases[:, -1]
    index = lengths.to(phases.device, torch.long)[:, None, None].expand(-1, 1, H)
    return theta, phases.expand(lengths.shape[0], -1, -1).gather(1, index)[:, 0]


# Each backend maps theta0 (B, H), drive (B, L, H), omega, kappa (H,), W (H, H), all of one dtype, to the phases 0..L (B, L + 1, H).


def reference(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float) -> Tensor:
    phases = [theta0]
    for u in drive.unbind(1):
        theta = phases[-1]
        force = (W * torch.sin(theta[:, None, :] - theta[:, :, None])).sum(-1)
        phases.append(torch.remainder(theta + dt * (omega + u + kappa * force), TWO_PI))
    return torch.stack(phases, 1)


def torch_backend(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float) -> Tensor:
    if exporting():
        return exported(theta0, drive, omega, kappa, W, dt)
    return forward_op(theta0, drive, omega, kappa, W, dt, "torch")


def native_backend(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float) -> Tensor:
    return forward_op(theta0, drive, omega, kappa, W, dt, "native")


def exported(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float) -> Tensor:
    """The same in operators that an exported file can hold: a loop whose length is an input. Export under torch.no_grad()."""
    theta0, add = theta0.contiguous(), (dt * (drive + omega)).transpose(0, 1)  # add (L, B, H)
    pull = (dt * kappa[:, None] * W).T.contiguous()
    if torch.jit.is_tracing():
        return scripted_loop()(theta0, add, pull).transpose(0, 1)
    from torch._higher_order_ops import scan  # private, so not needed by anything but an export

    last, theta = scan(lambda theta, a: (euler_step(theta, a, pull), theta.clone()), theta0, add)
    return torch.cat([theta.transpose(0, 1), last[:, None]], 1)


def euler_step(theta: Tensor, add: Tensor, pull: Tensor) -> Tensor:
    sin, cos = theta.sin(), theta.cos()
    return torch.remainder(theta + add + cos * (sin @ pull) - sin * (cos @ pull), 2 * math.pi)


def loop(theta: Tensor, add: Tensor, pull: Tensor) -> Tensor:
    phases = [theta]
    for t in range(add.shape[0]):
        phases.append(euler_step(phases[t], add[t], pull))
    return torch.stack(phases)


@cache
def scripted_loop() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """TorchScript's tracer would unroll a Python loop; a scripted one it keeps. Compiled here at the first such export."""
    return torch.jit.script(loop)


# The opaque operator. Both loops run over time-major buffers and write into them, and sum_j W_ij sin(theta_j - theta_i) is taken as
# cos_i (W sin)_i - sin_i (W cos)_i, one matrix product on sin and cos stacked: at these sizes a step costs the calls it makes.


def wrap_(theta: Tensor) -> Tensor:
    """In place; torch.remainder is five times slower."""
    return theta.sub_((theta / TWO_PI).floor_().mul_(TWO_PI))


@torch.library.custom_op("lab::kuramoto_scan", mutates_args=())
def forward_op(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float, backend: str) -> Tensor:
    B, L, H = drive.shape
    if backend == "native":
        return native_forward(theta0, drive, omega, kappa, W, dt)
    phases = drive.new_empty(L + 1, B, H)
    phases[0] = theta0
    phases[1:] = (dt * (drive + omega)).transpose(0, 1)  # what a step adds without coupling; the loop adds the rest
    pull = (dt * kappa[:, None] * W).T.contiguous()  # (j, i)
    waves, pulls = drive.new_empty(2, B, H), drive.new_empty(2, B, H)
    (sin, cos), (pull_sin, pull_cos) = waves, pulls
    waves_flat, pulls_flat = waves.view(2 * B, H), pulls.view(2 * B, H)
    rows = phases.unbind(0)
    for t, (theta, after) in enumerate(zip(rows[:-1], rows[1:], strict=True)):
        torch.sin(theta, out=sin)
        torch.cos(theta, out=cos)
        torch.mm(waves_flat, pull, out=pulls_flat)
        after.addcmul_(cos, pull_sin).addcmul_(sin, pull_cos, value=-1).add_(theta)
        if t % WRAP_EVERY == WRAP_EVERY - 1:
            wrap_(after)
    wrap_(phases[1:])
    return phases.transpose(0, 1).contiguous()


def native_pitch(t: Tensor) -> int:
    """H of t (..., H), rounded up to whole vectors, in which the kernel works."""
    return -(-t.shape[-1] // native.width(t)) * native.width(t)


def native_forward(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float) -> Tensor:
    B, L, H = drive.shape
    pitch = native_pitch(drive)
    phases = drive.new_zeros(B, L + 1, pitch)
    phases[:, 0, :H] = theta0
    torch.add(drive, omega, out=phases[:, 1:, :H]).mul_(dt)
    pull = F.pad((dt * kappa[:, None] * W).T, (0, pitch - H)).contiguous()
    native.call("kuramoto_scan", drive.dtype, phases, pull, B, L, H, pitch, work=drive.numel() * (2 * H + 20))
    return phases[..., :H].contiguous()


@forward_op.register_fake
def _(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float, backend: str) -> Tensor:
    B, L, H = drive.shape
    return drive.new_empty(B, L + 1, H)


@torch.library.custom_op("lab::kuramoto_scan_backward", mutates_args=())
def backward_op(
    grad: Tensor, phases: Tensor, kappa: Tensor, W: Tensor, dt: float, grad_W: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad (B, L + 1, H) of the phases -> gradients of theta0, drive, omega, kappa, W (empty unless grad_W).

    The adjoint a_t = dLoss/dtheta_t obeys  a_t = grad_t + J_t^T a_{t+1}.  With m = dt kappa a_{t+1}:
        (J^T a)_k = a_k - m_k sum_j W_kj cos(theta_j - theta_k) + sum_i m_i W_ik cos(theta_k - theta_i)
    """
    adjoints, g_kappa = (native_adjoints if backend == "native" else torch_adjoints)(grad, phases, kappa, W, dt)
    g_drive = dt * adjoints[:, 1:]
    g_W = phases.new_empty(0)
    if grad_W:
        theta, a = phases[:, :-1].flatten(0, 1), adjoints[:, 1:].flatten(0, 1)
        sin, cos = theta.sin(), theta.cos()
        g_W = dt * kappa[:, None] * ((a * cos).T @ sin - (a * sin).T @ cos)
    return adjoints[:, 0].clone(), g_drive, g_drive.sum((0, 1)), g_kappa, g_W


def torch_adjoints(grad: Tensor, phases: Tensor, kappa: Tensor, W: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    """a (B, L + 1, H), and the gradient of kappa. All that does not contain a is computed for all steps before the loop."""
    B, _, H = phases.shape
    theta = phases[:, :-1].transpose(0, 1).contiguous()  # time-major, as every buffer of the loop
    waves = torch.stack([theta.sin(), theta.cos()], 1)  # (L, 2, B, H)
    pulls = waves @ W.T
    (sin, cos), (pull_sin, pull_cos) = waves.unbind(1), pulls.unbind(1)
    keep = 1 - dt * kappa * (cos * pull_cos + sin * pull_sin)  # (L, B, H), what a step keeps of the adjoint
    push = dt * kappa[:, None] * W  # (i, k)

    adjoints = grad.transpose(0, 1).clone(memory_format=torch.contiguous_format)  # (L + 1, B, H); the loop adds what comes from later steps
    weighted, pushed = phases.new_empty(2, B, H), phases.new_empty(2, B, H)
    weighted_flat, pushed_flat = weighted.view(2 * B, H), pushed.view(2 * B, H)
    pushed_sin, pushed_cos = pushed
    rows = adjoints.unbind(0)
    for a, later, kept, wave in reversed(list(zip(rows[:-1], rows[1:], keep.unbind(0), waves.unbind(0), strict=True))):
        torch.mul(wave, later, out=weighted)
        torch.mm(weighted_flat, push, out=pushed_flat)
        pushed.mul_(wave)
        a.addcmul_(kept, later).add_(pushed_sin).add_(pushed_cos)
    g_kappa = dt * (adjoints[1:] * (cos * pull_sin - sin * pull_cos)).sum((0, 1))
    return adjoints.transpose(0, 1).contiguous(), g_kappa


def native_adjoints(grad: Tensor, phases: Tensor, kappa: Tensor, W: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    B, steps, H = phases.shape
    pitch = native_pitch(phases)
    pad = (0, pitch - H)
    adjoints, of_gain = phases.new_zeros(B, steps, pitch), phases.new_empty(B, pitch)
    adjoints[..., :H] = grad
    pull, push, gain = (F.pad(t, pad).contiguous() for t in (W.T, dt * kappa[:, None] * W, dt * kappa))
    phases = F.pad(phases, pad).contiguous()
    sizes, work = (B, steps - 1, H, pitch), grad.numel() * (4 * H + 30)
    native.call("kuramoto_scan_backward", phases.dtype, adjoints, phases, pull, push, gain, of_gain, *sizes, work=work)
    return adjoints[..., :H], dt * of_gain[:, :H].sum(0)


@backward_op.register_fake
def _(
    grad: Tensor, phases: Tensor, kappa: Tensor, W: Tensor, dt: float, grad_W: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, steps, H = phases.shape
    g_W = phases.new_empty((H, H) if grad_W else 0)
    return phases.new_empty(B, H), phases.new_empty(B, steps - 1, H), torch.empty_like(kappa), torch.empty_like(kappa), g_W


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *_, kappa, W, ctx.dt, ctx.backend = inputs
    ctx.save_for_backward(output, kappa, W)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_W = ctx.needs_input_grad[4]
    *grads, g_W = backward_op(grad, *ctx.saved_tensors, ctx.dt, grad_W, ctx.backend)
    return *grads, g_W if grad_W else None, None, None


differentiable_once("kuramoto_scan", forward_op, backward_op, _save, _backward, twice="reference")
for device in ("cpu", "cuda"):  # phases accumulate: float32 under autocast, inside the operators too
    forward_op.register_autocast(device, torch.float32)
    backward_op.register_autocast(device, torch.float32)

KURAMOTO_SCAN = Op(
    "kuramoto_scan",
    (
        Backend("native", native_backend, supports=lambda *args: native.why_not(*args[:-1])),
        Backend("torch", torch_backend),
        Backend("reference", reference),
    ),
    example=lambda: (torch.rand(2, 5), torch.randn(2, 9, 5), torch.randn(5), torch.randn(5), torch.randn(5, 5), 0.1),
)
