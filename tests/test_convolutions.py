"""causal_conv, ssm_kernel and fft_conv: every backend against the float64 reference, values and all gradients."""

from __future__ import annotations

import pytest
import torch
from op_checks import compare, numbers, of

from lab.ops import causal_conv, fft_conv, native, ssm_kernel


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
    _, state = causal_conv(x, w, dilation=2, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        rest, _ = causal_conv(x[b : b + 1, n:], w, dilation=2, state=state[b : b + 1])
        torch.testing.assert_close(rest, whole[b : b + 1, n:])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("taps", [0, 1, 5, 40])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 0, 3), (3, 33, 5)], ids=str)
def test_fft_conv(shape, taps, dtype):
    g = torch.Generator().manual_seed(0)
    sizes = shape, (shape[2], taps), (shape[2],)
    args = [numbers(*size, dtype=torch.float64, g=g).to(dtype).requires_grad_() for size in sizes]
    compare(fft_conv, "torch", args, dtype, call=lambda u, K, D: (fft_conv(u, K, D),))
