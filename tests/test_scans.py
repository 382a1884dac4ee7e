"""linear_recurrence and selective_scan: every backend against the float64 reference, values and all gradients."""

from __future__ import annotations

import pytest
import torch
from op_checks import compare, numbers, of

from lab.ops import linear_recurrence, native, selective_scan, use

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


@pytest.mark.skipif(native.LIBRARY is None, reason="a property of the C++ kernel, which is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_selective_scan_takes_saved_tensors_at_any_address(dtype):
    """Other code may keep them for autograd, such as arrays of numpy, which begin on no vector's border."""
    args = scan_inputs((2, 40, 70), 6, dtype)

    def moved(t):
        place = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
        return place.copy_(t)

    def gradients():
        y, last = selective_scan(*args)
        return torch.autograd.grad(y.square().sum() + last.sum(), args)

    want = gradients()
    with torch.autograd.graph.saved_tensors_hooks(moved, lambda t: t):
        got = gradients()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(native.LIBRARY is None, reason="a property of the C++ kernel, which is not built")
def test_selective_scan_refuses_saved_states_of_another_size():
    u, dt, A, B, C, D, _, h0 = (t.detach() for t in scan_inputs((2, 40, 70), 6, torch.float32))
    starts = torch.zeros(0)  # what a forward pass without gradients leaves
    with pytest.raises(ValueError, match=r"selective_scan: the saved states must be \(2, .*, got \(0,\)"):
        torch.ops.lab.selective_scan_backward(u, h0, u, dt, A, B, C, D, starts, "native")


@pytest.mark.parametrize("name", of(selective_scan))
def test_selective_scan_without_states_is_refused(name):
    with use(selective_scan=name), pytest.raises(ValueError, match=r"A \(3, 0\) has no states, d_state must be at least 1"):
        selective_scan(*scan_inputs((2, 4, 3), 0, torch.float32))


@pytest.mark.skipif(native.LIBRARY is None, reason="a property of the C++ kernel, which is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_selective_scan_of_a_growing_state_is_nan(dtype):
    """Never a number that only looks like one. The other channels are as they were."""
    u, dt, A, B, C, D, *_ = (t.detach() for t in scan_inputs((2, 5, 20), 3, dtype))
    grows = A.clone()
    grows[7, 1] = 1e-3
    with use(selective_scan="native"):
        want, got = (selective_scan(u, dt, a, B, C, D)[0] for a in (A, grows))
    assert got[..., 7].isnan().all()
    others = [e for e in range(20) if e != 7]
    assert torch.equal(got[..., others], want[..., others])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", of(selective_scan))
def test_what_the_padding_holds_does_not_reach_the_last_state_of_selective_scan(name, bad):
    args = [t.detach() for t in scan_inputs((3, 40, 20), 4, torch.float32)]
    lengths = torch.tensor([0, 17, 40])
    padding = torch.arange(40) >= lengths[:, None]
    padded = [t.clone() for t in args]
    for i in (0, 1, 3, 4, 6):  # u, dt, B, C, z
        padded[i][padding] = bad
    with use(selective_scan=name):
        y, last = selective_scan(*padded, lengths=lengths)
        whole, _ = selective_scan(*args)
        torch.testing.assert_close(y[~padding], whole[~padding])
        for b, n in enumerate(lengths.tolist()):
            row = [t[b : b + 1, :n] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(args)]
            row[7] = args[7][b : b + 1]
            torch.testing.assert_close(last[b : b + 1], selective_scan(*row)[1])


@pytest.mark.parametrize("name", of(linear_recurrence))
def test_what_the_padding_holds_does_not_reach_the_last_state_of_linear_recurrence(name):
    a, x, h0 = (t.detach() for t in recurrence_inputs((3, 40, 20), True, torch.float32))
    lengths = torch.tensor([0, 17, 40])
    _, want = linear_recurrence(a, x, h0, lengths)
    for t in (a, x):
        t[torch.arange(40) >= lengths[:, None]] = float("nan")
    with use(linear_recurrence=name):
        torch.testing.assert_close(linear_recurrence(a, x, h0, lengths)[1], want)
