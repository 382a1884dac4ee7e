"""Kuramoto oscillators over time: coupled phases with a drive per step.

    lattice   theta_{t+1} = wrap(theta_t + dt [omega + u_t + kappa * F(theta_t)]),   F_i(theta) = sum_j W_ij sin(theta_j - theta_i)
    mesh      theta_{t+1} = wrap(theta_t + clip(dt [omega + u_t] + tanh(kappa * F(theta_t)), -pi, pi))

B = batch, L = length, H = oscillators. wrap takes the remainder modulo 2 pi, up to rounding. The drive u enters like a change of the
natural frequency omega. Nonlinear in theta, hence sequential in t. Source: Kuramoto (1975), by explicit Euler; the mesh, whose coupling
is bounded, is LaminarNet's.

Backends
    native     C++, four rows at a time (csrc/cpu/kuramoto_scan.cpp); CUDA, a thread for each oscillator.
    torch      one opaque operator with a hand-written gradient: a compiled graph sees one node. While exporting, a loop of free length.
    reference  the formula in a plain loop.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.ops import native
from lab.ops.backend import Backend, Op, differentiable_once, exporting

TWO_PI = 2 * math.pi
Form = Literal["lattice", "mesh"]
EVEN = 16  # sides of a matrix product; of others MKL sums the borders in an order that depends on the number of threads
WRAP_EVERY = 16  # steps; between two wraps a phase stays small enough for float32


def kuramoto_scan(
    theta0: Tensor,
    drive: Tensor,
    omega: Tensor,
    kappa: Tensor,
    W: Tensor,
    dt: float,
    lengths: Tensor | None = None,
    form: Form = "lattice",
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
    if form not in ("lattice", "mesh"):
        raise ValueError(f"kuramoto_scan: form={form!r}; expected lattice or mesh")
    dtype = torch.float32
    for t in (theta0, drive, omega, kappa, W):
        dtype = torch.promote_types(dtype, t.dtype)
    theta0, drive, omega, kappa, W = (t.to(dtype) for t in (theta0, drive, omega, kappa, W))
    phases = KURAMOTO_SCAN(theta0.expand(B, H), drive, omega, kappa, W, dt, form)
    theta = phases[:, :-1]
    if lengths is None:
        return theta, phases[:, -1]
    index = lengths.to(phases.device, torch.long)[:, None, None].expand(-1, 1, H)
    return theta, phases.expand(lengths.shape[0], -1, -1).gather(1, index)[:, 0]


# Each backend maps theta0 (B, H), drive (B, L, H), omega, kappa (H,), W (H, H), all of one dtype, to the phases 0..L (B, L + 1, H).


def reference(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float, form: Form) -> Tensor:
    phases = [theta0]
    for u in drive.unbind(1):
        theta = phases[-1]
        force = (W * torch.sin(theta[:, None, :] - theta[:, :, None])).sum(-1)
        if form == "mesh":
            step = torch.clamp(dt * (omega + u) + torch.tanh(kappa * force), -math.pi, math.pi)
        else:
            step = dt * (omega + u + kappa * force)
        phases.append(torch.remainder(theta + step, TWO_PI))
    return torch.stack(phases, 1)


def torch_backend(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float, form: Form) -> Tensor:
    if exporting():
        return exported(theta0, drive, omega, kappa, W, dt, form)
    return forward_op(theta0, drive, omega, kappa, W, dt, form, "torch")


def native_backend(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float, form: Form) -> Tensor:
    return forward_op(theta0, drive, omega, kappa, W, dt, form, "native")


def exported(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float, form: Form) -> Tensor:
    """The same in operators that an exported file can hold: a loop whose length is an input. Export under torch.no_grad()."""
    theta0, add = theta0.contiguous(), (dt * (drive + omega)).transpose(0, 1)  # add (L, B, H)
    mesh = form == "mesh"
    pull = (coupling_gain(kappa, dt, form)[:, None] * W).T.contiguous()
    turn = torch.tensor(TWO_PI, dtype=theta0.dtype, device=theta0.device)  # a number ONNX would round to float32
    if torch.jit.is_tracing():
        return scripted_loop()(theta0, add, pull, turn, mesh).transpose(0, 1)
    from torch._higher_order_ops import scan  # private, so not needed by anything but an export

    last, theta = scan(lambda theta, a: (euler_step(theta, a, pull, turn, mesh), theta.clone()), theta0, add)
    return torch.cat([theta.transpose(0, 1), last[:, None]], 1)


def euler_step(theta: Tensor, add: Tensor, pull: Tensor, turn: Tensor, mesh: bool) -> Tensor:
    sin, cos = theta.sin(), theta.cos()
    coupling = cos * (sin @ pull) - sin * (cos @ pull)
    step = (add + coupling.tanh()).clamp(-math.pi, math.pi) if mesh else add + coupling
    return torch.remainder(theta + step, turn)


def loop(theta: Tensor, add: Tensor, pull: Tensor, turn: Tensor, mesh: bool) -> Tensor:
    phases = [theta]
    for t in range(add.shape[0]):
        phases.append(euler_step(phases[t], add[t], pull, turn, mesh))
    return torch.stack(phases)


@cache
def scripted_loop() -> Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]:
    """TorchScript's tracer would unroll a Python loop; a scripted one it keeps. Compiled here at the first such export."""
    return torch.jit.script(loop)


# The opaque operator. Both loops run over time-major buffers and write into them, and sum_j W_ij sin(theta_j - theta_i) is taken as
# cos_i (W sin)_i - sin_i (W cos)_i, one matrix product on sin and cos stacked: at these sizes a step costs the calls it makes.


def wrap_(theta: Tensor) -> Tensor:
    """In place; torch.remainder is five times slower."""
    return theta.sub_((theta / TWO_PI).floor_().mul_(TWO_PI))


@torch.library.custom_op("lab::kuramoto_scan", mutates_args=())
def forward_op(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float, form: str, backend: str) -> Tensor:
    return (native_forward if backend == "native" else torch_forward)(theta0, drive, omega, kappa, W, dt, form)


def coupling_gain(kappa: Tensor, dt: float, form: str) -> Tensor:
    """(H,): what F is multiplied by, in the mesh before the tanh"""
    return kappa if form == "mesh" else dt * kappa


def torch_forward(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float, form: str) -> Tensor:
    B, L, H = drive.shape
    phases = drive.new_empty(L + 1, B, H)
    phases[0] = theta0
    phases[1:] = (dt * (drive + omega)).transpose(0, 1)  # what a step adds without coupling; the loop adds the rest
    pull = (coupling_gain(kappa, dt, form)[:, None] * W).T.contiguous()  # (j, i)
    waves, pulls = drive.new_empty(2, B, H), drive.new_empty(2, B, H)
    (sin, cos), (pull_sin, pull_cos) = waves, pulls
    waves_flat, pulls_flat = waves.view(2 * B, H), pulls.view(2 * B, H)
    rows = phases.unbind(0)
    for t, (theta, after) in enumerate(zip(rows[:-1], rows[1:], strict=True)):
        torch.sin(theta, out=sin)
        torch.cos(theta, out=cos)
        torch.mm(waves_flat, pull, out=pulls_flat)
        if form == "mesh":
            pulls.mul_(waves.flip(0))
            after.add_(pull_sin.sub_(pull_cos).tanh_()).clamp_(-math.pi, math.pi).add_(theta)
        else:
            after.addcmul_(cos, pull_sin).addcmul_(sin, pull_cos, value=-1).add_(theta)
        if t % WRAP_EVERY == WRAP_EVERY - 1:
            wrap_(after)
    wrap_(phases[1:])
    return phases.transpose(0, 1).contiguous()


def native_pitch(t: Tensor) -> int:
    """H of t (..., H), rounded up to whole vectors, in which the kernel works."""
    return -(-t.shape[-1] // native.width(t)) * native.width(t)


def native_forward(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float, form: str) -> Tensor:
    B, L, H = drive.shape
    pitch = native_pitch(drive)
    phases = drive.new_zeros(B, L + 1, pitch)
    phases[:, 0, :H] = theta0
    torch.add(drive, omega, out=phases[:, 1:, :H]).mul_(dt)
    pull = F.pad((coupling_gain(kappa, dt, form)[:, None] * W).T, (0, pitch - H)).contiguous()
    work = drive.numel() * (2 * H + 20)
    native.call("kuramoto_scan", drive.dtype, phases, pull, B, L, H, pitch, int(form == "mesh"), work=work)
    return phases[..., :H].contiguous()


@forward_op.register_fake
def _(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float, form: str, backend: str) -> Tensor:
    B, L, H = drive.shape
    return drive.new_empty(B, L + 1, H)


@torch.library.custom_op("lab::kuramoto_scan_backward", mutates_args=())
def backward_op(
    grad: Tensor, phases: Tensor, steps: Tensor | None, kappa: Tensor, W: Tensor, dt: float, grad_W: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad (B, L + 1, H) of the phases -> gradients of theta0, drive, omega, kappa, W (empty unless grad_W). steps (B, L, H) =
    omega + u where the form is mesh: its clip lets a gradient through or not.

    The adjoint a_t = dLoss/dtheta_t obeys  a_t = grad_t + J_t^T a_{t+1}.  With c = dLoss/d(kappa F_t) and m = kappa c:
        (J^T a)_k = a_k - m_k sum_j W_kj cos(theta_j - theta_k) + sum_i m_i W_ik cos(theta_k - theta_i)
    In the lattice c = dt a_{t+1}, in the mesh c = (1 - tanh^2) a_{t+1}, or 0 where the step was clipped.
    """
    free = None if steps is None else dt * steps
    adjoints, of_coupling, g_kappa = (native_adjoints if backend == "native" else torch_adjoints)(grad, phases, free, kappa, W, dt)
    g_drive = dt * adjoints[:, 1:]
    g_W = phases.new_empty(0)
    if grad_W:
        H = len(kappa)
        c = g_drive if of_coupling is None else of_coupling
        theta, c = (F.pad(t.flatten(0, 1), (0, -H % EVEN)) for t in (phases[:, :-1], c))
        sin, cos = theta.sin(), theta.cos()
        g_W = kappa[:, None] * ((c * cos).T @ sin - (c * sin).T @ cos)[:H, :H]
    return adjoints[:, 0].clone(), g_drive, g_drive.sum((0, 1)), g_kappa, g_W


def torch_adjoints(
    grad: Tensor, phases: Tensor, free: Tensor | None, kappa: Tensor, W: Tensor, dt: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """a (B, L + 1, H), in the mesh 0 from step 1 on where a clip held it back, c (B, L, H) (None: dt a, of the lattice), and the
    gradient of kappa. All that does not contain a is computed for all steps before the loop."""
    B, _, H = phases.shape
    theta = phases[:, :-1].transpose(0, 1).contiguous()  # time-major, as every buffer of the loop
    waves = torch.stack([theta.sin(), theta.cos()], 1)  # (L, 2, B, H)
    pulls = waves @ W.T
    (sin, cos), (pull_sin, pull_cos) = waves.unbind(1), pulls.unbind(1)
    force = cos * pull_sin - sin * pull_cos
    if free is None:
        slope, weights, push = torch.full_like(kappa, dt), waves, dt * kappa[:, None] * W  # push (i, k)
    else:
        tanh = (kappa * force).tanh()
        through = (free.transpose(0, 1) + tanh).abs() <= math.pi
        slope = (1 - tanh * tanh) * through
        weights, push = waves * (slope * kappa)[:, None], W
    keep = 1 - slope * kappa * (cos * pull_cos + sin * pull_sin)  # (L, B, H), what a step keeps of the adjoint

    adjoints = grad.transpose(0, 1).clone(memory_format=torch.contiguous_format)  # (L + 1, B, H); the loop adds what comes from later steps
    weighted, pushed = phases.new_empty(2, B, H), phases.new_empty(2, B, H)
    weighted_flat, pushed_flat = weighted.view(2 * B, H), pushed.view(2 * B, H)
    pushed_sin, pushed_cos = pushed
    rows = adjoints.unbind(0)
    steps = zip(rows[:-1], rows[1:], keep.unbind(0), waves.unbind(0), weights.unbind(0), strict=True)
    for a, later, kept, wave, weight in reversed(list(steps)):
        torch.mul(weight, later, out=weighted)
        torch.mm(weighted_flat, push, out=pushed_flat)
        pushed.mul_(wave)
        a.addcmul_(kept, later).add_(pushed_sin).add_(pushed_cos)
    of_coupling = slope * adjoints[1:]
    g_kappa = (of_coupling * force).sum((0, 1))
    if free is None:
        return adjoints.transpose(0, 1).contiguous(), None, g_kappa
    adjoints[1:].mul_(through)
    return adjoints.transpose(0, 1).contiguous(), of_coupling.transpose(0, 1), g_kappa


def native_adjoints(
    grad: Tensor, phases: Tensor, free: Tensor | None, kappa: Tensor, W: Tensor, dt: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    B, steps, H = phases.shape
    pitch = native_pitch(phases)
    pad = (0, pitch - H)
    adjoints, of_kappa = phases.new_zeros(B, steps, pitch), phases.new_empty(B, pitch)
    adjoints[..., :H] = grad
    gain = coupling_gain(kappa, dt, "lattice" if free is None else "mesh")
    pull, push, gain = (F.pad(t, pad).contiguous() for t in (W.T, W, gain))
    phases = F.pad(phases, pad).contiguous()
    free = None if free is None else F.pad(free, pad).contiguous()  # the kernel leaves c there
    sizes, work = (B, steps - 1, H, pitch), grad.numel() * (4 * H + 30)
    native.call("kuramoto_scan_backward", phases.dtype, adjoints, phases, pull, push, gain, of_kappa, free, *sizes, work=work)
    g_kappa = of_kappa[:, :H].sum(0)
    return adjoints[..., :H], None if free is None else free[..., :H], dt * g_kappa if free is None else g_kappa


@backward_op.register_fake
def _(
    grad: Tensor, phases: Tensor, steps: Tensor | None, kappa: Tensor, W: Tensor, dt: float, grad_W: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, L, H = phases.shape[0], phases.shape[1] - 1, phases.shape[2]
    g_W = phases.new_empty((H, H) if grad_W else 0)
    return phases.new_empty(B, H), phases.new_empty(B, L, H), torch.empty_like(kappa), torch.empty_like(kappa), g_W


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, drive, omega, kappa, W, ctx.dt, form, ctx.backend = inputs
    ctx.save_for_backward(output, *((drive, omega) if form == "mesh" else (None, None)), kappa, W)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_W = ctx.needs_input_grad[4]
    phases, drive, omega, kappa, W = ctx.saved_tensors
    steps = None if drive is None else drive + omega
    *grads, g_W = backward_op(grad, phases, steps, kappa, W, ctx.dt, grad_W, ctx.backend)
    return *grads, g_W if grad_W else None, None, None, None


differentiable_once("kuramoto_scan", forward_op, backward_op, _save, _backward, twice="reference")
for device in ("cpu", "cuda"):  # phases accumulate: float32 under autocast, inside the operators too
    forward_op.register_autocast(device, torch.float32)
    backward_op.register_autocast(device, torch.float32)


def flops(theta0: Tensor, drive: Tensor, omega: Tensor, kappa: Tensor, W: Tensor, dt: float, form: Form) -> float:
    """A step: two products with W, of the sines and the cosines, and for each oscillator 2 of the drive, 2 of its sine and cosine, 3 of the
    coupling, 2 of the sum and 1 of the wrap; 2 more of the mesh's bounds."""
    return drive.numel() * (4 * drive.shape[-1] + (12 if form == "mesh" else 10))


KURAMOTO_SCAN = Op(
    "kuramoto_scan",
    (
        Backend("native", native_backend, supports=lambda *args: native.why_not(*args[:-2])),
        Backend("torch", torch_backend),
        Backend("reference", reference),
    ),
    example=lambda: (torch.rand(2, 5), torch.randn(2, 9, 5), torch.randn(5), torch.randn(5), torch.randn(5, 5), 0.1, "lattice"),
    forms=("lattice", "mesh"),
    flops=flops,
)
