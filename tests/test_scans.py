"""linear_recurrence and selective_scan: every backend against the float64 reference, values and all gradients."""

from __future__ import annotations

import pytest
import torch

from lab import ops
from lab.ops import linear_recurrence, native, selective_scan, use

SHAPES = [(1, 1, 1), (2, 0, 3), (1, 7, 5), (3, 33, 17), (2, 100, 64), (1, 130, 203), (0, 4, 3)]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def numbers(*shape, dtype, g):
    return torch.randn(*shape, generator=g, dtype=dtype)


def of(op) -> list[str]:
    """The backends of an op that are here, but for the reference. Without a compiler there is no native one."""
    return [name for name in ops.ops()[op.__name__] if name != "reference" and (name != "native" or native.LIBRARY)]


def recurrence_inputs(shape, per_step, dtype, seed=0):
    B, L, D = shape
    g = torch.Generator().manual_seed(seed)
    size = (B, L, D) if per_step else (D,)
    a = torch.rand(size, generator=g, dtype=torch.float64)
    if dtype.is_complex:
        a = torch.polar(a, 6 * torch.rand(size, generator=g, dtype=torch.float64))
    h0, x = numbers(B, D, dtype=dtype.to_complex() if dtype.is_complex else torch.float64, g=g), numbers(B, L, D, dtype=dtype, g=g)
    return [t.to(dtype).requires_grad_() for t in (a, x, h0)]


def scan_inputs(shape, N, dtype, seed=0, complex_A=False):
    B, L, E = shape
    g = torch.Generator().manual_seed(seed)
    real = dict(dtype=torch.float64, g=g)
    dt = torch.nn.functional.softplus(numbers(B, L, E, **real) - 2)
    A = -torch.exp(numbers(E, N, **real))
    inputs = [numbers(B, L, E, **real), dt, A, numbers(B, L, N, **real), numbers(B, L, N, **real), numbers(E, **real), numbers(B, L, E, **real)]
    inputs.append(numbers(B, E, N, **real))
    if complex_A:
        for i in (2, 3, 4, 7):
            inputs[i] = torch.complex(inputs[i], numbers(*inputs[i].shape, **real))
    return [t.to(dtype.to_complex() if t.is_complex() else dtype).requires_grad_() for t in inputs]


def compare(op, name, args, dtype, call=None):
    """The backend `name` in `dtype` against the reference in float64, on the same numbers."""
    exact = [t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_() for t in args]
    g = torch.Generator().manual_seed(9)
    results = []
    for backend, inputs in (("reference", exact), (name, args)):
        with use(**{op.__name__: backend}):
            out = (call or op)(*inputs)
        g.manual_seed(9)
        loss = sum((numbers(*y.shape, dtype=torch.float64, g=g) * (y.real if y.is_complex() else y)).sum() for y in out)
        results.append([*out, *torch.autograd.grad(loss, inputs, materialize_grads=True)])
    for i, (want, got) in enumerate(zip(*results, strict=True)):
        assert got.dtype in (dtype.to_real(), dtype.to_complex()), i
        scale = want.detach().abs().max() if want.numel() else 1
        torch.testing.assert_close(got.to(want.dtype), want, rtol=0, atol=float(TOLERANCE[dtype.to_real()] * (scale + 1e-30)), msg=lambda m, i=i: f"{i}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("per_step", [True, False], ids=["per step", "constant"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", of(linear_recurrence))
def test_linear_recurrence(name, shape, per_step, dtype):
    compare(linear_recurrence, name, recurrence_inputs(shape, per_step, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("N", [1, 4, 16, 23])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", of(selective_scan))
def test_selective_scan(name, shape, N, dtype):
    compare(selective_scan, name, scan_inputs(shape, N, dtype), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selective_scan_with_complex_states(shape):
    compare(selective_scan, "torch", scan_inputs(shape, 3, torch.float64, complex_A=True), torch.float64)
