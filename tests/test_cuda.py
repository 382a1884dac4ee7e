"""The CUDA kernels without a GPU: compiled for the host, where a loop over blocks and threads runs them behind the ops as they are."""

from __future__ import annotations

import ctypes

import pytest
import torch
from op_checks import compare, numbers
from test_native import NATIVE, example, larger, results, same
from test_scans import recurrence_inputs, scan_inputs

from lab import compiler
from lab.ops import causal_conv, fft_conv, kuramoto_scan, linear_recurrence, native, selective_scan, ssm_kernel

ROOT = compiler.ROOT
has_compiler = pytest.mark.skipif(compiler.compiler_version() is None, reason=f"there is no C++ compiler {compiler.compiler()!r} here")


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    """csrc/cuda by the C++ compiler, where csrc/cuda/grid.h runs one thread after the other."""
    target = tmp_path_factory.mktemp("cuda") / "host.so"
    sources = [file for file in compiler.cuda_sources() if file.suffix == ".cu"]
    compiler.compile_library(sources, target, list(compiler.LEVELS)[-1], ["-O1", "-Wall", "-Wno-unknown-pragmas", "-x", "c++"])
    return ctypes.CDLL(str(target))


@pytest.fixture
def on_the_host(host_library, monkeypatch):
    """native calls these kernels. Every tensor that nobody has written holds NaN."""
    call = native._call

    def checked(*args):
        error = call(*args)
        assert error == 0, error

    monkeypatch.setattr(native, "_call", checked)
    monkeypatch.setattr(native, "LIBRARY", host_library)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    native.function.cache_clear()
    torch.use_deterministic_algorithms(True)
    yield host_library
    torch.use_deterministic_algorithms(False)
    native.function.cache_clear()


@has_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("per_step", [True, False], ids=["per step", "constant"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 0, 3), (1, 7, 5), (0, 4, 3), (3, 33, 17), (2, 130, 203)], ids=str)
def test_linear_recurrence(on_the_host, shape, per_step, dtype):
    compare(linear_recurrence, "native", recurrence_inputs(shape, per_step, dtype), dtype)


@has_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "N"), [((1, 1, 1), 1), ((2, 0, 3), 4), ((0, 4, 3), 2), ((3, 33, 17), 16), ((1, 50, 203), 23)], ids=str)
def test_selective_scan(on_the_host, shape, N, dtype):
    compare(selective_scan, "native", scan_inputs(shape, N, dtype), dtype)


@has_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("K", "dilation"), [(1, 1), (4, 1), (3, 5)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 0, 3), (3, 3, 17), (2, 33, 203)], ids=str)
def test_causal_conv(on_the_host, shape, K, dilation, dtype):
    B, L, D = shape
    g = torch.Generator().manual_seed(0)
    sizes = (B, L, D), (K, D), (D,), (B, (K - 1) * dilation, D)
    args = [numbers(*size, dtype=torch.float64, g=g).to(dtype).requires_grad_() for size in sizes]
    compare(causal_conv, "native", args, dtype, call=lambda x, w, bias, state: causal_conv(x, w, bias, dilation, state))


@has_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("H", "N", "L"), [(1, 1, 1), (3, 5, 40), (2, 8, 2300), (4, 8, 0)])
def test_ssm_kernel(on_the_host, H, N, L, dtype):
    g = torch.Generator().manual_seed(0)
    w = torch.stack([-0.2 * torch.rand(H, N, generator=g), 3 * torch.rand(H, N, generator=g)], -1)
    args = [t.to(dtype).requires_grad_() for t in (w, numbers(H, N, 2, dtype=torch.float64, g=g))]
    compare(ssm_kernel, "native", args, dtype, call=lambda w, c: (ssm_kernel(w, c, L),))


@has_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "taps"), [((1, 1, 1), 1), ((2, 0, 3), 0), ((0, 4, 3), 4), ((3, 16, 5), 9), ((2, 17, 40), 17), ((2, 300, 3), 300)], ids=str
)
def test_fft_conv(on_the_host, shape, taps, dtype):
    B, L, D = shape
    g = torch.Generator().manual_seed(0)
    args = [numbers(*size, dtype=torch.float64, g=g).to(dtype).requires_grad_() for size in ((B, L, D), (D, taps), (D,))]
    compare(fft_conv, "native", args, dtype, call=lambda u, K, D: (fft_conv(u, K, D),))


@has_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 0, 3), (1, 7, 2), (5, 17, 7), (20, 9, 12), (2, 3, 300)], ids=str)
def test_kuramoto_scan(on_the_host, shape, dtype):
    B, L, H = shape
    g = torch.Generator().manual_seed(0)
    sizes = (B, H), (B, L, H), (H,), (H,), (H, H)
    args = [numbers(*size, dtype=torch.float64, g=g).to(dtype) for size in sizes]
    args[-1] /= H

    def points(*args):
        theta, last = kuramoto_scan(*args, 0.2)
        return theta.cos(), theta.sin(), last.cos(), last.sin()  # 0 and 2 pi are the same

    compare(kuramoto_scan, "native", [t.requires_grad_() for t in args], dtype, call=points)


@has_compiler
@pytest.mark.parametrize("op", NATIVE, ids=lambda op: op.name)
@pytest.mark.parametrize("arguments", [example, larger])
def test_no_thread_waits_for_another_one_before_a_barrier(on_the_host, op, arguments):
    args = arguments(op)
    order, by_order = ctypes.c_int64.in_dll(on_the_host, "backwards"), []
    for order.value in (0, 1):
        by_order.append(results(op, args))
    order.value = 0
    assert same(*by_order)
