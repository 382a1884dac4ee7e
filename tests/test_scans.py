"""linear_recurrence and selective_scan: every backend against the float64 reference, values and all gradients."""

from __future__ import annotations

import pytest
import torch
from op_checks import compare, numbers, of

from lab.ops import linear_recurrence, selective_scan

SHAPES = [(1, 1, 1), (2, 0, 3), (1, 7, 5), (3, 33, 17), (2, 100, 64), (1, 130, 203), (0, 4, 3)]


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
    u, b, c, D, z = (numbers(*shape, **real) for shape in ((B, L, E), (B, L, N), (B, L, N), (E,), (B, L, E)))
    inputs = [u, dt, A, b, c, D, z, numbers(B, E, N, **real)]
    if complex_A:
        for i in (2, 3, 4, 7):
            inputs[i] = torch.complex(inputs[i], numbers(*inputs[i].shape, **real))
    return [t.to(dtype.to_complex() if t.is_complex() else dtype).requires_grad_() for t in inputs]


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
