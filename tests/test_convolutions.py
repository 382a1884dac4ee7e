"""causal_conv, ssm_kernel and fft_conv: every backend against the float64 reference, values and all gradients."""

from __future__ import annotations

import pytest
import torch
from op_checks import compare, numbers, of

from lab.ops import causal_conv, fft_conv, native, ssm_kernel, use
from lab.ops.fft_conv import backward_op, forward_op


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("K", "dilation"), [(1, 1), (2, 1), (4, 1), (3, 5), (7, 2)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 0, 3), (3, 3, 17), (2, 40, 64), (1, 33, 203)], ids=str)
@pytest.mark.parametrize("name", of(causal_conv))
def test_causal_conv(name, shape, K, dilation, dtype):
    B, L, D = shape
    g = torch.Generator().manual_seed(0)
    sizes = (B, L, D), (K, D), (D,), (B, (K - 1) * dilation, D)
    args = [numbers(*size, dtype=torch.float64, g=g).to(dtype).requires_grad_() for size in sizes]
    compare(causal_conv, name, args, dtype, call=lambda x, w, bias, state: causal_conv(x, w, bias, dilation, state))


def test_causal_conv_carries_its_tail_over_ragged_rows():
    g = torch.Generator().manual_seed(0)
    x, w = numbers(3, 9, 4, dtype=torch.float64, g=g), numbers(3, 4, dtype=torch.float64, g=g)
    lengths = torch.tensor([0, 4, 9])
    whole, _ = causal_conv(x, w, dilation=2)
    padded = x.masked_fill((torch.arange(9) >= lengths[:, None])[..., None], float("nan"))
    _, state = causal_conv(padded, w, dilation=2, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        rest, _ = causal_conv(x[b : b + 1, n:], w, dilation=2, state=state[b : b + 1])
        torch.testing.assert_close(rest, whole[b : b + 1, n:])


def test_causal_conv_refuses_integers_and_no_taps():
    with pytest.raises(ValueError, match="causal_conv: x must hold floating point numbers, as y takes its dtype; got torch.int64"):
        causal_conv(torch.ones(1, 4, 3, dtype=torch.long), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"causal_conv: w \(0, 3\) has no taps, it must have at least 1"):
        causal_conv(torch.ones(1, 4, 3), torch.ones(0, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("H", "N", "L"), [(1, 1, 1), (3, 5, 40), (2, 32, 1000), (4, 8, 0)])
@pytest.mark.parametrize("name", of(ssm_kernel))
def test_ssm_kernel(name, H, N, L, dtype):
    g = torch.Generator().manual_seed(0)
    w = torch.stack([-0.2 * torch.rand(H, N, generator=g), 3 * torch.rand(H, N, generator=g)], -1)
    args = [t.to(dtype).requires_grad_() for t in (w, numbers(H, N, 2, dtype=torch.float64, g=g))]
    compare(ssm_kernel, name, args, dtype, call=lambda w, c: (ssm_kernel(w, c, L),))


@pytest.mark.skipif(native.LIBRARY is None, reason="a property of the C++ kernel, which is not built")
def test_the_native_kernel_stays_accurate_over_a_long_sequence():
    g = torch.Generator().manual_seed(0)
    w = torch.stack([-1e-3 * torch.rand(2, 8, generator=g), 3 * torch.rand(2, 8, generator=g)], -1)
    c = numbers(2, 8, 2, dtype=torch.float32, g=g)
    exact = ssm_kernel(w.double(), c.double(), 16_384)
    assert (ssm_kernel(w, c, 16_384) - exact).abs().max() < 3e-6 * exact.abs().max()


def conv_inputs(shape, taps, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = shape, (shape[2], taps), (shape[2],)
    return [numbers(*size, dtype=torch.float64, g=g).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("taps", [0, 1, 5, 40])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 0, 3), (0, 4, 3), (3, 33, 5), (2, 30, 203)], ids=str)
@pytest.mark.parametrize("name", of(fft_conv))
def test_fft_conv(name, shape, taps, dtype):
    compare(fft_conv, name, conv_inputs(shape, taps, dtype), dtype, call=lambda u, K, D: (fft_conv(u, K, D),))


@pytest.mark.parametrize("name", of(fft_conv))
def test_fft_conv_without_the_term_of_the_input(name):
    compare(fft_conv, name, conv_inputs((2, 9, 4), 9, torch.float64)[:2], torch.float64, call=lambda u, K: (fft_conv(u, K),))


@pytest.mark.skipif(native.LIBRARY is None, reason="a property of the C++ kernel, which is not built")
def test_fft_conv_at_every_kind_of_length():
    """2^k and 3 2^k, one below and one above each: all plans of the transform, against the torch backend in float64."""
    for n in sorted({2**k for k in range(1, 12)} | {3 * 2**k for k in range(1, 10)}):
        for L in (n - 1, n, n + 1):
            exact = conv_inputs((1, L, 3), L, torch.float64)
            args = [t.detach().float().requires_grad_() for t in exact]
            results = []
            for backend, (u, K, D) in (("torch", exact), ("native", args)):
                with use(fft_conv=backend):
                    y = fft_conv(u, K, D)
                results.append([y, *torch.autograd.grad(y.square().sum(), (u, K, D))])
            for want, got in zip(*results, strict=True):
                assert (got - want).abs().max() < 3e-6 * want.abs().max(), L


@pytest.mark.skipif(native.LIBRARY is None, reason="a property of the C++ kernel, which is not built")
def test_fft_conv_reads_strided_tensors_and_fills_all_that_it_returns(monkeypatch):
    u, K, D = (t.detach() for t in conv_inputs((2, 30, 70), 30, torch.float32))
    want = fft_conv(u, K, D)
    wide = torch.randn(2, 30, 140)
    wide[..., ::2] = u
    strided = wide[..., ::2].requires_grad_(), K.T.contiguous().T.requires_grad_(), D.requires_grad_()
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    plain = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: plain(*args, **options).fill_(float("nan")))
    y = fft_conv(*strided)
    grads = torch.autograd.grad(y.sum(), strided)
    assert torch.equal(y, want) and all(grad.isfinite().all() for grad in grads)


@pytest.mark.skipif(native.LIBRARY is None, reason="a property of the C++ kernel, which is not built")
def test_fft_conv_is_an_ordinary_operator():
    args = conv_inputs((2, 9, 5), 7, torch.float32)
    torch.library.opcheck(forward_op, tuple(args))
    torch.library.opcheck(backward_op, (torch.randn(2, 9, 5), *args), test_utils=("test_schema", "test_faketensor"))
    y = fft_conv(*args)
    (grad,) = torch.autograd.grad(y.square().sum(), args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"fft_conv: no second derivative; use\(fft_conv='torch'\) has one"):
        grad.sum().backward()
