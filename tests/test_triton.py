"""The backend triton: its kernels simulated on the CPU against the float64 reference, and compiled for GPUs that are not here.

TRITON_INTERPRET must be set before triton is imported, and would make Triton a backend of every other test: a process of its own simulates.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import sys
import warnings

import pytest
import torch
from op_checks import compare, numbers
from test_scans import recurrence_inputs, scan_inputs
from torch._subclasses.fake_tensor import FakeTensorMode

from lab import ops
from lab.mixers import MambaLayer
from lab.ops import linear_recurrence, selective_scan, ssm_kernel, use
from lab.ops.triton import launch

pytestmark = pytest.mark.skipif(not launch.INSTALLED, reason="the package triton is not installed: it is for Linux on x86-64")


def begin():
    warnings.simplefilter("error")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def simulated():
    """simulated(function, *arguments) calls a function of this file in a process where Triton simulates a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin)
        imported = pool.submit(triton_is_imported).result(timeout=120)
    with pool:
        assert not imported, "importing lab.ops imports triton"
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=300)


def triton_is_imported():
    return "triton" in sys.modules


# What runs in that process


def check_recurrence(shape, per_step, dtype):
    compare(linear_recurrence, "triton", recurrence_inputs(shape, per_step, dtype), dtype)


def check_scan(shape, N, dtype):
    compare(selective_scan, "triton", scan_inputs(shape, N, dtype), dtype)


def check_kernel(H, N, L, dtype):
    g = torch.Generator().manual_seed(0)
    w, c = (numbers(H, N, 2, dtype=torch.float64, g=g) for _ in range(2))
    w[..., 0] = -w[..., 0].abs() / 20
    compare(ssm_kernel, "triton", [t.to(dtype).requires_grad_() for t in (w, c)], dtype, call=lambda w, c: (ssm_kernel(w, c, L),))


def error_at_the_end_of_a_long_kernel():
    w, c = torch.tensor([[[-1e-5, 77.0]]]), torch.tensor([[[1.0, 0.0]]])  # 77 L rounds to 0.004 in float32
    with use("triton"):
        got = ssm_kernel(w, c, 700)
    return float((got - ssm_kernel(w.double(), c.double(), 700)).abs().max())


def check_narrow_blocks():
    """More channels than a program has."""
    wide, launch.ELEMENTS = launch.ELEMENTS, 64
    try:
        check_scan((1, 17, 3), 2, torch.float32)
        check_recurrence((1, 2, 3), True, torch.float32)
    finally:
        launch.ELEMENTS = wide


def check_lengths():
    """A row's last state is that after its own steps, whatever stands in the padding."""
    lengths = torch.tensor([0, 17, 18])
    u, dt, A, B, C, D, z, h0 = (t.detach() for t in scan_inputs((3, 18, 2), 3, torch.float32))
    a, x, start = (t.detach() for t in recurrence_inputs((3, 18, 2), True, torch.complex64))
    padding = torch.arange(18) >= lengths[:, None]
    want = linear_recurrence(a, x, start, lengths)[1], selective_scan(u, dt, A, B, C, D, z, h0, lengths)[1]
    for t in (u, dt, B, C, z, a, x):
        t[padding] = float("nan")
    ops.forget()
    with use("triton"):
        got = linear_recurrence(a, x, start, lengths)[1], selective_scan(u, dt, A, B, C, D, z, h0, lengths)[1]
    assert ops.used() == {"linear_recurrence": "triton", "selective_scan": "triton"}
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def check_operators():
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    a, x, h0 = recurrence_inputs((2, 3, 2), False, torch.float32)
    torch.library.opcheck(torch.ops.lab.linear_recurrence, (a, x, h0, "triton"), test_utils=tests)
    u, dt, A, B, C, D, _, h0 = scan_inputs((1, 3, 2), 2, torch.float32)
    torch.library.opcheck(torch.ops.lab.selective_scan, (u, dt, A, B, C, D, h0, "triton", True), test_utils=tests)
    w = torch.rand(2, 3, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.lab.ssm_kernel, (w, w, 4, "triton"), test_utils=tests)


def check_compiled_layer():
    layer, x = MambaLayer(4, d_state=2), torch.randn(1, 5, 4)
    want = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    with use("triton"):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(x).square().sum(), list(layer.parameters()))
    assert ops.used()["selective_scan"] == "triton"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def chosen():
    """Which backend runs where nobody chose one, and what is said of a complex A and of half precision."""
    args = [t.detach() for t in scan_inputs((1, 2, 1), 1, torch.float32)]
    selective_scan(*args)
    backend = {backend.name: backend for backend in next(op for op in ops.every() if op.name == "selective_scan").backends}["triton"]
    flat = [*args[:6], args[7]]
    return ops.used()["selective_scan"], [
        backend.supports(*(t.to(dtype) if i == place else t for i, t in enumerate(flat)))
        for place, dtype in ((2, torch.complex64), (2, torch.bfloat16), (2, torch.float32))
    ]


# The tests


@pytest.mark.parametrize(
    ("shape", "per_step", "dtype"),
    [
        ((2, 19, 5), True, torch.float32), ((2, 17, 3), False, torch.float64), ((1, 18, 3), False, torch.complex64),
        ((1, 17, 2), True, torch.complex128), ((1, 1, 1), False, torch.float32), ((2, 0, 3), True, torch.float32),
        ((0, 4, 3), False, torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_linear_recurrence(simulated, shape, per_step, dtype):
    simulated(check_recurrence, shape, per_step, dtype)


@pytest.mark.parametrize(
    ("shape", "N", "dtype"),
    [((2, 18, 3), 3, torch.float32), ((1, 33, 1), 2, torch.float64), ((2, 0, 3), 2, torch.float32), ((0, 4, 3), 1, torch.float32)],
    ids=str,
)
def test_selective_scan(simulated, shape, N, dtype):
    simulated(check_scan, shape, N, dtype)


def test_several_blocks_of_channels(simulated):
    simulated(check_narrow_blocks)


@pytest.mark.parametrize(
    ("H", "N", "L", "dtype"), [(2, 17, 70, torch.float32), (1, 3, 9, torch.float64), (2, 3, 0, torch.float32)], ids=str
)
def test_ssm_kernel(simulated, H, N, L, dtype):
    simulated(check_kernel, H, N, L, dtype)


def test_ssm_kernel_is_accurate_at_late_positions(simulated):
    assert simulated(error_at_the_end_of_a_long_kernel) < 3e-6


def test_lengths(simulated):
    simulated(check_lengths)


def test_as_operators_and_compiled(simulated):
    simulated(check_operators)
    simulated(check_compiled_layer)


def test_saved_states_of_another_size_are_refused():
    u, dt, A, B, C, D, _, h0 = (t.detach() for t in scan_inputs((2, 40, 7), 6, torch.float32))
    with pytest.raises(ValueError, match=r"selective_scan: the saved states must be \(2, 3, 7, 6\), got \(0,\)"):
        torch.ops.lab.selective_scan_backward(u, h0, u, dt, A, B, C, D, torch.zeros(0), "triton")


def test_the_rule_of_choice(simulated, monkeypatch):
    first, (complex_A, half, fits) = simulated(chosen)
    assert first == ops.ops()["selective_scan"][0 if ops.native.LIBRARY is not None else 1] and fits is None
    assert complex_A.startswith("torch.complex64 is not among") and half.startswith("torch.bfloat16 is not among")
    x = torch.ones(1, 1, 1)
    with use(linear_recurrence="triton"), pytest.raises(RuntimeError, match="a tensor is on cpu, Triton computes on a GPU"):
        linear_recurrence(x, x)
    with FakeTensorMode(), torch.device("cuda"):  # a GPU that is not here can be asked about
        there = torch.ones(1, 1, 1)
        assert launch.why_not(there, there) is None
        assert launch.why_not(there, torch.ones(1, device="cpu")).startswith("a tensor is on cpu")
    monkeypatch.setattr(launch, "INSTALLED", False)
    with use(linear_recurrence="triton"), pytest.raises(RuntimeError, match="triton: the package triton is not installed"):
        linear_recurrence(x, x)


KERNELS = {
    "recurrence": {"PER_STEP": True, "COMPLEX": True, "T": 16, "W": 32},
    "selective": {"KEEP": True, "T": 16, "W": 8, "STATES": 16},
    "kernel": {"R": 16, "P": 64},
    "recurrence_backward": {"PER_STEP": False, "COMPLEX": True, "T": 16, "W": 32},
    "selective_backward": {"T": 16, "W": 8, "STATES": 16},
    "backward": {"R": 16, "P": 64},
}
SIZES = ("batch", "L", "E", "N")


@pytest.mark.parametrize("name", [*list(KERNELS)[:3], *(pytest.param(name, marks=pytest.mark.slow) for name in list(KERNELS)[3:])])
def test_kernels_compile_for_a_gpu(name, monkeypatch, tmp_path):
    """Down to machine code for sm_90; the simulation accepts what the compiler does not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton 3.9 warns
    assert os.environ.get("TRITON_INTERPRET") is None
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lab.ops.triton import scans, vandermonde

    function, constants = getattr(vandermonde if "R" in KERNELS[name] else scans, name), KERNELS[name]
    sizes = {*SIZES, "D"} if "recurrence" in name else set(SIZES)
    types = {arg: "constexpr" if arg in constants else "i32" if arg in sizes else "*fp32" for arg in function.arg_names}
    compiled = triton.compile(ASTSource(function, types, constexprs=constants), target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 1000
