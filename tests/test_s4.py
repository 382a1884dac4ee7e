"""S4: its ops cauchy_kernel and dplr_scan, every backend against the float64 reference; its kernel against the dense bilinear system."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from op_checks import compare, numbers, of

from lab.analysis.conformance import randomise
from lab.layers.hippo import Hippo, InitMethod, eigenvalues, hippo, low_rank
from lab.mixers import S4Layer
from lab.ops import cauchy_kernel, dplr_scan, native, use

METHODS = get_args(InitMethod)
needs_native = pytest.mark.skipif(native.LIBRARY is None, reason="a property of the C++ kernel, which is not built")


# The sums


def poles(H, R, N, dtype):
    g = torch.Generator().manual_seed(0)
    w = torch.stack([-0.02 - 0.2 * torch.rand(H, N, generator=g), 3 * torch.rand(H, N, generator=g)], -1)
    return [t.to(dtype).requires_grad_() for t in (w, numbers(H, R, N, 2, dtype=torch.float64, g=g))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("H", "R", "N", "L"), [(1, 1, 1, 1), (3, 4, 5, 40), (2, 9, 3, 2), (3, 7, 4, 33), (2, 3, 32, 301)])
@pytest.mark.parametrize("name", of(cauchy_kernel))
def test_cauchy_kernel(name, H, R, N, L, dtype):
    compare(cauchy_kernel, name, poles(H, R, N, dtype), dtype, call=lambda w, v: (cauchy_kernel(w, v, L),))


@pytest.mark.parametrize("L", [6, 7])
def test_cauchy_sums_are_finite_where_z_is_minus_one(L):
    """The textbook form, of (1 - z) / (1 + z), divides by 0 there, at k = L / 2 of an even L. Against its numerators, times 1 + z."""
    w, v = (t.detach() for t in poles(2, 3, 4, torch.float64))
    for name in ("reference", *of(cauchy_kernel)):
        with use(cauchy_kernel=name):
            Q = torch.view_as_complex(cauchy_kernel(w, v, L))
        z = torch.exp(-2j * math.pi * torch.arange(L // 2 + 1, dtype=torch.float64) / L)
        pole, residue = torch.view_as_complex(w)[:, None, :, None], torch.view_as_complex(v)[..., None]
        wanted = sum(a / ((1 - z) - (1 + z) * b) for a, b in ((residue, pole), (residue.conj(), pole.conj()))).sum(2)
        torch.testing.assert_close(Q, wanted * 2 * torch.exp(-1j * math.pi * torch.arange(L // 2 + 1, dtype=torch.float64) / L))


@needs_native
def test_a_peak_of_the_native_sums_keeps_its_digits():
    """A pole close to the axis, at a point of the grid: e = (c |w|)^2 - s^2 nearly cancels."""
    L, k = 4096, 512
    w = torch.tensor([[[-1e-5, math.tan(math.pi * k / L)]]], dtype=torch.float32)
    v = torch.ones(1, 1, 1, 2)
    exact, got = cauchy_kernel(w.double(), v.double(), L), cauchy_kernel(w, v, L)
    assert exact.abs().max() > 1e4 and (got - exact).abs().max() < 2e-2 * exact.abs().max()


@pytest.mark.parametrize(
    ("w", "v", "length", "told"),
    [
        ((3, 5, 2), (3, 5, 2), 4, r"expected w \(H, N, 2\) and v \(H, R, N, 2\), got \(3, 5, 2\) and \(3, 5, 2\)"),
        ((3, 5, 2), (3, 1, 4, 2), 4, "expected w"),
        ((3, 5, 2), (3, 1, 5, 2), 0, "length=0 must be at least 1"),
    ],
)
def test_cauchy_kernel_refuses(w, v, length, told):
    with pytest.raises(ValueError, match=f"^cauchy_kernel: {told}"):
        cauchy_kernel(torch.zeros(w), torch.zeros(v), length)


# The recurrence


def system(B, L, D, n, r, dtype):
    """u, h0 and the matrices of a system that forgets."""
    g = torch.Generator().manual_seed(0)
    real = -0.1 - 0.3 * torch.rand(D, n, generator=g)
    d = torch.stack([real, torch.rand(D, n, generator=g) - 0.5], -1)
    right, left = (0.1 * numbers(r, D, n, 2, dtype=torch.float64, g=g) for _ in range(2))
    sizes = (B, L, D), (B, D, n, 2), (D, n, 2), (D, n, 2)
    u, h0, b, C = (numbers(*size, dtype=torch.float64, g=g) for size in sizes)
    return [t.to(dtype).requires_grad_() for t in (u, h0, d, right, left, b, C)]


def scanned(B, L, ragged):
    """The op, on rows of several lengths if `ragged`, and without what it gives of padding."""
    lengths = torch.tensor([L, 0, L // 2])[:B] if ragged else None

    def call(*args):
        y, last = dplr_scan(*args, lengths)
        return (y if lengths is None else y * (torch.arange(L) < lengths[:, None])[..., None]), last

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("B", "L", "D", "n", "r"), [(1, 1, 1, 1, 1), (2, 0, 3, 2, 1), (3, 33, 5, 3, 2), (2, 64, 17, 2, 1), (2, 131, 3, 4, 3)]
)
@pytest.mark.parametrize("name", of(dplr_scan))
def test_dplr_scan(name, B, L, D, n, r, ragged, dtype):
    compare(dplr_scan, name, system(B, L, D, n, r, dtype), dtype, scanned(B, L, ragged))


@pytest.mark.parametrize("name", of(dplr_scan))
def test_dplr_scan_starts_from_zeros(name):
    u, h0, *matrices = (t.detach() for t in system(2, 9, 3, 2, 1, torch.float64))
    with use(dplr_scan=name):
        torch.testing.assert_close(dplr_scan(u, None, *matrices), dplr_scan(u, 0 * h0, *matrices))


def test_dplr_scan_names_wrong_shapes():
    args = system(2, 9, 3, 2, 1, torch.float32)
    for i in range(7):
        wrong = [t[..., :1] if i == j else t for j, t in enumerate(args)]
        with pytest.raises(ValueError, match=r"^dplr_scan: expected u \(B, L, D\), h0"):
            dplr_scan(*wrong)


# The layer


@pytest.mark.parametrize("method", METHODS)
def test_low_rank_starts(method):
    N = 8
    torch.manual_seed(0)
    found = low_rank(method, N)
    assert (found.eigenvalues.real < 0).all() and found.P.shape[0] == (2 if method == "legt" else 1)
    both = [torch.cat([t, t.conj()], -1) for t in found]
    A = both[0].diag() - both[2].T @ both[2].conj()
    if method not in get_args(Hippo):
        torch.manual_seed(0)  # of method="random"
        torch.testing.assert_close(found.eigenvalues, eigenvalues(method, N))
        return
    want, B, _ = hippo(method, N)  # in another basis: the same answer to an impulse of any length
    if method != "legs":
        want = want - 1e-2 * torch.eye(N)
    for t in (0.1, 1.0):
        torch.testing.assert_close(
            torch.linalg.matrix_exp(t * A).trace().real, torch.linalg.matrix_exp(t * want).trace(), rtol=1e-9, atol=0
        )
        moment = both[1].conj() @ torch.linalg.matrix_exp(t * A) @ both[1]
        torch.testing.assert_close(moment.real, B @ torch.linalg.matrix_exp(t * want) @ B, rtol=1e-9, atol=1e-9)


def dense(layer, length):
    """The kernels of a layer, by its bilinear system as full complex matrices: (directions, D, length)."""
    A, dt = layer.continuous()
    A, P, B, C = (torch.view_as_complex(t.detach().double()) for t in (A, layer.P, layer.B, layer.C))
    A, P, B, C = (torch.cat([t, t.conj()], -1) for t in (A, P, B, C))
    A = torch.diag_embed(A) - torch.einsum("rdn,rdm->dnm", P, P.conj())
    one, half = torch.eye(A.shape[-1], dtype=A.dtype), dt.detach().double()[..., None] / 2
    back = torch.linalg.inv(one - half * A)
    step, state = back @ (one + half * A), back @ (2 * half * B[..., None])
    K = []
    for _ in range(length):
        K.append((C[:, :, None] @ state)[..., 0, 0].real)
        state = step @ state
    return torch.stack(K, -1)


@pytest.mark.parametrize(("length", "rate"), [(1, 1.0), (2, 1.0), (33, 2.0), (64, 1.0)])
@pytest.mark.parametrize("method", METHODS)
def test_the_kernel_is_that_of_the_dense_system(method, length, rate):
    layer = S4Layer(6, d_state=16, init_method=method, bidirectional=True, rate=rate)
    for random in (False, True):
        if random:
            randomise(layer, 0)
        layer.double()  # of the same numbers
        want = dense(layer, length)
        exact = torch.stack(layer.kernels(length))
        torch.testing.assert_close(exact, want, rtol=0, atol=1e-11 * want.abs().max().item())
        single = torch.stack(layer.float().kernels(length))
        torch.testing.assert_close(single.double(), want, rtol=0, atol=2e-5 * want.abs().max().item())


def test_the_kernel_follows_the_parameters():
    """None is kept over an optimiser's step, nor over a change of the rate."""
    layer, x = S4Layer(4, d_state=8), torch.randn(2, 9, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer(x)
    before.square().mean().backward()
    optimizer.step()
    after = layer(x)
    layer.rate = 2.0
    assert not torch.allclose(before, after, atol=1e-4) and not torch.allclose(after, layer(x), atol=1e-4)


def test_a_compiled_layer():
    layer, x = S4Layer(8, d_state=8), torch.randn(2, 9, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want, got = (torch.autograd.grad(f(x).square().sum(), list(layer.parameters())) for f in (layer, compiled))
    torch.testing.assert_close(got, want)


@torch.no_grad()
def test_many_steps_stay_with_the_convolution():
    """Steps of any length: the state is rounded to float32 after each, and what is computed of it is not."""
    layer, x = S4Layer(8, d_state=16, init_method="legt").eval(), torch.randn(2, 300, 8)
    randomise(layer, 0)
    want, state = layer(x), layer.init_state(2)
    for t in range(300):
        out = layer(x[:, t : t + 1], state, want=("state",))
        state = out.state
        torch.testing.assert_close(out.y[:, 0], want[:, t], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["legs", "legt"])
def test_the_other_backends_compute_the_same_layer(method):
    """Gradients too: without a compiler, and on a device without kernels, this is what runs."""
    layer, x = S4Layer(5, d_state=8, init_method=method), torch.randn(2, 70, 5)
    randomise(layer, 0)
    results = []
    for backend in of(dplr_scan):
        with use(backend):
            y, state, *_ = layer(x[:, 5:], layer(x[:, :5], want=("state",)).state, want=("state",))
            whole = layer(x)
        loss = y.square().sum() + state["h"].square().sum() + whole.square().sum()
        results.append([y, state["h"], whole, *torch.autograd.grad(loss, list(layer.parameters()))])
    for got in results:
        for a, b in zip(got, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
