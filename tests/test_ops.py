"""kuramoto_scan: both backends against independent float64 code, the operator as the compiler, autocast and export see it, dispatch."""

from __future__ import annotations

import importlib
import logging
import math
from functools import partial
from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lab import ops
from lab.config import compose
from lab.mixers import Lattice
from lab.models import Stack, initialise
from lab.ops import backend, kuramoto_scan, native, use

scan_module = importlib.import_module("lab.ops.kuramoto_scan")  # the name in lab.ops is the function
BACKENDS = [name for name in ops.ops()["kuramoto_scan"] if name != "native" or native.LIBRARY]  # without a compiler there is no native
OPERATORS = BACKENDS[:-1]  # those that are an operator of their own
FORMS = ["lattice", "mesh"]
SHAPES = [(1, 1, 1), (2, 0, 3), (1, 7, 2), (3, 33, 8), (5, 17, 7), (2, 40, 12)]


def inputs(B, L, H, seed=0, dtype=torch.float64, form="lattice"):
    g = torch.Generator().manual_seed(seed)
    theta0 = 2 * math.pi * torch.rand(B, H, generator=g, dtype=dtype)
    drive, omega, kappa = (torch.randn(*s, generator=g, dtype=dtype) for s in ((B, L, H), (H,), (H,)))
    W = torch.randn(H, H, generator=g, dtype=dtype)
    if form == "mesh":
        drive, W = 10 * drive, W / H  # many steps are clipped; its steps are larger, and chaos would hide what a backend gets wrong
    return [t.requires_grad_() for t in (theta0, drive, omega, kappa, W)]


def circle(theta):
    """Phases as points: 0 and 2 pi are the same."""
    return torch.stack([theta.cos(), theta.sin()])


def scalar(theta, last):
    weight = torch.linspace(-1, 1, theta.numel(), dtype=theta.dtype).reshape(theta.shape)
    return (weight * circle(theta)).sum() + (circle(last) * torch.tensor([1.0, 2.0], dtype=theta.dtype)[:, None, None]).sum()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_by_a_loop_over_oscillators(name, form, shape):
    B, L, H = shape
    theta0, drive, omega, kappa, W = (t.detach() for t in inputs(*shape, form=form))
    with use(name):
        theta, last = kuramoto_scan(theta0, drive, omega, kappa, W, 0.3, form=form)
    assert theta.shape == (B, L, H) and last.shape == (B, H) and theta.dtype == torch.float64
    for b in range(B):
        phase = theta0[b].tolist()
        for t in range(L + 1):
            got = last[b] if t == L else theta[b, t]
            torch.testing.assert_close(circle(got), circle(torch.tensor(phase, dtype=torch.float64)), rtol=0, atol=1e-9)
            assert t == 0 or ((got > -1e-9) & (got < 2 * math.pi + 1e-9)).all(), "not wrapped"
            if t < L:
                pull = [sum(W[i, j] * math.sin(phase[j] - phase[i]) for j in range(H)) for i in range(H)]
                free, coupled = [0.3 * float(omega[i] + drive[b, t, i]) for i in range(H)], [float(kappa[i] * pull[i]) for i in range(H)]
                if form == "mesh":
                    steps = [max(-math.pi, min(math.pi, f + math.tanh(c))) for f, c in zip(free, coupled, strict=True)]
                else:
                    steps = [f + 0.3 * c for f, c in zip(free, coupled, strict=True)]
                phase = [p + step for p, step in zip(phase, steps, strict=True)]


@pytest.mark.parametrize("lengths", [None, "ragged"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_the_backends_agree(shape, form, lengths):
    B, L, H = shape
    lengths = None if lengths is None else (torch.arange(B) * 5) % (L + 1)
    args = inputs(*shape, form=form)
    results = {}
    for name in BACKENDS:
        with use(name):
            theta, last = kuramoto_scan(*args, 0.2, lengths, form)
            results[name] = [theta, last, *torch.autograd.grad(scalar(theta, last), args, materialize_grads=True)]
    names = ("theta", "last", "theta0", "drive", "omega", "kappa", "W")
    for name in BACKENDS:
        for got, want, what in zip(results[name], results["reference"], names, strict=True):
            compare = circle if what in ("theta", "last") else (lambda t: t)
            torch.testing.assert_close(
                compare(got), compare(want), rtol=1e-9, atol=1e-9, msg=lambda text, what=what, name=name: f"{name}, {what}: {text}"
            )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_by_finite_differences(name, form):
    args = inputs(2, 5, 3, form=form)
    with use(kuramoto_scan=name):
        torch.autograd.gradcheck(lambda *a: circle(kuramoto_scan(*a, 0.2, form=form)[0]), args)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_clip_stops_a_gradient_and_a_wrap_does_not(name):
    theta0, drive = torch.full((1, 1), 6.0, requires_grad=True), torch.tensor([[[1.0], [4.0], [-4.0]]], requires_grad=True)
    one = torch.ones(1)
    with use(name):
        theta, last = kuramoto_scan(theta0, drive, 0 * one, one, one[None], 1.0, form="mesh")
    phases = [6, 7 - 2 * math.pi, 7 - math.pi, 7 - 2 * math.pi]
    torch.testing.assert_close(torch.cat([theta.flatten(), last.flatten()]), torch.tensor(phases))
    grads = torch.autograd.grad(last.sum(), (theta0, drive))
    assert [grad.flatten().tolist() for grad in grads] == [[1], [1, 0, 0]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("needed", range(5))
def test_gradient_of_one_input_alone(needed, form):
    args = [t.detach().requires_grad_(i == needed) for i, t in enumerate(inputs(2, 9, 4, form=form))]
    grads = []
    for name in BACKENDS:
        with use(name):
            grads += torch.autograd.grad(scalar(*kuramoto_scan(*args, 0.2, form=form)), args[needed])
    for grad in grads:
        torch.testing.assert_close(grad, grads[-1])


def test_last_is_the_phase_after_the_last_real_token():
    args = inputs(4, 6, 3)
    lengths = torch.tensor([0, 1, 4, 6])
    theta, last = kuramoto_scan(*args, 0.2, lengths)
    full, end = kuramoto_scan(*args, 0.2)
    assert torch.equal(theta, full)
    for b, n in enumerate(lengths.tolist()):
        assert torch.equal(last[b], end[b] if n == 6 else full[b, n])


def test_a_carried_state_continues():
    theta0, drive, *rest = inputs(2, 50, 4, dtype=torch.float32)
    full, end = kuramoto_scan(theta0, drive, *rest, 0.2)
    first, middle = kuramoto_scan(theta0, drive[:, :21], *rest, 0.2)
    second, last = kuramoto_scan(middle, drive[:, 21:], *rest, 0.2)
    torch.testing.assert_close(circle(torch.cat([first, second], 1)), circle(full), rtol=0, atol=1e-5)
    torch.testing.assert_close(circle(last), circle(end), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_mesh_stays_accurate_over_a_long_sequence(name):
    """Without coupling each oscillator stands at t omega."""
    L = 100_000 if name == "native" else 10_000  # 8 s
    omega, one = torch.tensor([0.0031, 0.7, 1.5707], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    still, none = torch.zeros(1, L, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    with use(name):
        theta, last = kuramoto_scan(0 * one, still, omega, one, none, 1.0, form="mesh")
    turns = (torch.arange(L + 1, dtype=torch.float64)[:, None] * omega) % (2 * math.pi)
    torch.testing.assert_close(circle(torch.cat([theta, last[:, None]], 1)[0]), circle(turns), rtol=0, atol=1e-9)


def test_float32_stays_accurate_over_a_long_sequence():
    args = [t.detach() for t in inputs(1, 5_000, 2)]
    args[2], args[3] = args[2] * 0 + 3, args[3] * 0  # many turns; without coupling errors do not grow by themselves
    exact, _ = kuramoto_scan(*args, 0.1)
    single, _ = kuramoto_scan(*(t.float() for t in args), 0.1)
    assert (circle(single.double()) - circle(exact)).abs().max() < 2e-4


@pytest.mark.parametrize("shape", [(1, 7, 2), (3, 9, 4)], ids=str)
def test_layouts_do_not_matter_and_gradients_are_not_overwritten(shape):
    args = inputs(*shape)
    theta, last = kuramoto_scan(*args, 0.2)
    want = torch.autograd.grad(scalar(theta, last), args)
    strided = [t.detach().unsqueeze(-1).repeat_interleave(2, -1)[..., 0].requires_grad_() for t in args]
    assert not strided[1].is_contiguous()
    grads = torch.autograd.grad(scalar(*kuramoto_scan(*strided, 0.2)), strided)
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(got, expected)
    # A gradient that is laid out by time first is read, not used as the workspace of the loop.
    B, L, H = shape
    for name, form in product(OPERATORS, FORMS):
        phases = scan_module.forward_op(*(t.detach() for t in args), 0.2, form, name)
        grad, steps = torch.randn(L + 1, B, H, dtype=torch.float64).transpose(0, 1), args[1].detach() if form == "mesh" else None
        before = grad.clone(), args[1].clone()
        scan_module.backward_op(grad, phases, steps, *(t.detach() for t in args[3:]), 1.0, True, name)
        assert torch.equal(grad, before[0]) and torch.equal(args[1], before[1])


def test_phases_without_a_batch_and_shared_phases_with_lengths():
    theta0, drive, *rest = (t.detach() for t in inputs(3, 6, 4))
    theta, _ = kuramoto_scan(theta0[0], drive, *rest, 0.2)
    assert torch.equal(theta[:, 0], theta0[:1].expand(3, -1))
    lengths = torch.tensor([1, 6, 0])
    one, last = kuramoto_scan(theta0[0], drive[:1], *rest, 0.2, lengths)
    assert one.shape == (1, 6, 4)
    torch.testing.assert_close(last, kuramoto_scan(theta0[0], drive[:1].expand(3, -1, -1), *rest, 0.2, lengths)[1])


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match="kuramoto_scan: form='net'; expected lattice or mesh"):
        kuramoto_scan(*inputs(1, 1, 1), 0.1, form="net")


@pytest.mark.parametrize("wrong", ["theta0", "omega", "kappa", "W", "drive"])
def test_wrong_shapes_are_named(wrong):
    args = dict(zip(("theta0", "drive", "omega", "kappa", "W"), inputs(3, 6, 4), strict=True))
    args[wrong] = args[wrong][..., :-1] if wrong != "drive" else args[wrong][0]
    with pytest.raises(ValueError, match=r"kuramoto_scan: expected drive \(B, L, H\).*; got"):
        kuramoto_scan(**args, dt=0.1)


def test_a_second_backward_is_an_error():
    args = inputs(2, 5, 3)
    (grad,) = torch.autograd.grad(scalar(*kuramoto_scan(*args, 0.2)), args[1], create_graph=True)
    with pytest.raises(RuntimeError, match="kuramoto_scan: no second derivative"):
        grad.sum().backward()
    with use("reference"):
        (grad,) = torch.autograd.grad(scalar(*kuramoto_scan(*args, 0.2)), args[1], create_graph=True)
    grad.sum().backward()
    assert args[0].grad.abs().max() > 0


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 0, 2)], ids=str)
def test_opcheck(shape, form, name):
    args = inputs(*shape, dtype=torch.float32, form=form)
    torch.library.opcheck(scan_module.forward_op, (*args, 0.2, form, name))
    phases = scan_module.forward_op(*args, 0.2, form, name).detach()
    steps = args[1].detach() if form == "mesh" else None
    args = [torch.randn_like(phases), phases, steps, *(t.detach() for t in args[3:])]
    for grad_W in (True, False):
        torch.library.opcheck(scan_module.backward_op, (*args, 0.2, grad_W, name))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_float32_under_autocast_and_for_half_inputs(name, form):
    args = inputs(2, 20, 4, dtype=torch.float32)
    scan = partial(kuramoto_scan, form=form)
    with use(name):
        want = scalar(*scan(*args, 0.2))
        grads = torch.autograd.grad(want, args)
        with torch.autocast("cpu", torch.bfloat16):
            theta, last = scan(*args, 0.2)
        assert theta.dtype == last.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):  # a backward inside autocast as well
            for got, expected in zip(torch.autograd.grad(scalar(theta, last), args), grads, strict=True):
                torch.testing.assert_close(got, expected)
            for operator in OPERATORS:
                assert scan_module.forward_op(*(t.detach().bfloat16() for t in args), 0.2, form, operator).dtype == torch.float32
        halves = [t.detach().bfloat16() for t in args]
        theta, last = scan(*halves, 0.2)
        assert theta.dtype == torch.float32
        torch.testing.assert_close(circle(theta), circle(scan(*(t.float() for t in halves), 0.2)[0]))


# Compiler and export


def block_loss(block, x):
    out = block(x, want=("losses",))
    return out.y.square().mean() + sum(out.losses.values())


def test_a_block_compiles_to_one_graph():
    torch._dynamo.reset()
    model = Stack(11, 16, 1, partial(Lattice, n_heads=4), max_len=16)
    initialise(model, 0)
    block, x = model.blocks[0], torch.randn(3, 5, 16)
    want = block_loss(block, x)
    grads = torch.autograd.grad(want, list(block.parameters()))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for _ in range(2):
        got = block_loss(compiled, x)
    assert counter.frame_count == 1
    names = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert sum("kuramoto_scan" in name for name in names) == 1, "the loop over time is not one node"
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, list(block.parameters())), grads)
    with use("reference"):  # the choice is part of what was compiled
        torch.testing.assert_close(block_loss(compiled, x), want)
    assert counter.frame_count == 2 and ops.used()["kuramoto_scan"] == "reference"


@pytest.mark.parametrize("options", [{}, {"drive": False}, {"phase_mode": "gain"}, {"phase_mode": "literal"}], ids=str)
def test_export_with_free_batch_and_length(options):
    model = Stack(11, 16, 2, partial(Lattice, n_heads=4, **options), max_len=40)
    initialise(model, 0)
    model.eval()
    example = torch.randint(0, 11, (3, 9))
    shapes = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=40)}}
    with torch.no_grad():
        exported = torch.export.export(model, (example,), dynamic_shapes=shapes)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert "scan" in targets and not any(target.startswith("lab") for target in targets)
    module = exported.module()
    for B, L in ((1, 1), (2, 2), (1, 40), (4, 17), (3, 9)):
        tokens = torch.randint(0, 11, (B, L))
        with torch.no_grad():
            torch.testing.assert_close(module(tokens), model(tokens), rtol=1e-4, atol=1e-5)


# The dispatch rule


@pytest.fixture
def two_backends(monkeypatch):
    """An op whose first backend takes only positive numbers."""
    monkeypatch.setattr(backend, "_ops", {})
    monkeypatch.setattr(backend, "_used", {})
    monkeypatch.setattr(backend, "_forced", {})
    fast = backend.Backend("fast", lambda x: x + 1, lambda x: None if x > 0 else f"{x} is not positive")
    return backend.Op("increment", (fast, backend.Backend("reference", lambda x: x + 1.0)))


def test_the_first_backend_that_can(two_backends, caplog):
    assert ops.used() == {}
    assert backend._used == {"increment": None}, "compiled code looks at the keys: one that comes later compiles every block twice"
    assert isinstance(two_backends(1), int) and ops.used() == {"increment": "fast"}
    with caplog.at_level(logging.WARNING, "lab.ops.backend"):
        assert isinstance(two_backends(-1), float) and ops.used() == {"increment": "reference"}
        two_backends(-1)
    assert caplog.messages == ["op increment does not use backend fast: -1 is not positive"], "one line, on first use"


def test_a_forced_backend(two_backends):
    with use("reference"):
        assert isinstance(two_backends(1), float)
        with use(increment="fast"):
            assert isinstance(two_backends(1), int)
            with pytest.raises(RuntimeError, match="op increment: .*fast: -1 is not positive"):
                two_backends(-1)
        assert isinstance(two_backends(1), float)
    assert isinstance(two_backends(1), int)
    ops.force({"increment": "reference"})
    assert isinstance(two_backends(1), float)
    ops.force({"increment": "auto"})
    assert isinstance(two_backends(1), int)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="ops.kuramoto_scan=fast: .*expected auto, native, torch, reference"):
        ops.force({"kuramoto_scan": "fast"})
    with pytest.raises(ValueError, match="ops.kuramoto: there is no such op; the ops are .*kuramoto_scan"):
        ops.force({"kuramoto": "torch"})
    with pytest.raises(ValueError, match="no such backend"), use("fast"):
        pass
    with use("reference"), pytest.raises(ValueError), use("fast"):
        pass
    kuramoto_scan(*inputs(1, 1, 1), 0.1)
    assert ops.used()["kuramoto_scan"] == BACKENDS[0], "a failed choice left something behind"


def test_the_config_lists_every_op():
    assert set(compose([]).config["ops"]) == set(ops.ops())
