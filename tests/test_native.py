"""The C++ kernels as a library: what is loaded, what a call refuses, threads, forks, and the build."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lab import compiler
from lab.mixers import MambaLayer
from lab.ops import linear_recurrence, native, selective_scan, use

ROOT = Path(__file__).parents[1]
built = pytest.mark.skipif(native.LIBRARY is None, reason=native.SAYS)


def inputs(B=2, L=40, D=70, N=4):
    g = torch.Generator().manual_seed(0)
    u, B_, C = (torch.randn(B, L, n, generator=g) for n in (D, N, N))
    return u, torch.rand(B, L, D, generator=g), -torch.rand(D, N, generator=g), B_, C, torch.randn(D, generator=g)


@built
@pytest.mark.parametrize(
    "wrong", [torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.float64), torch.zeros(8)[::2], torch.zeros(1).expand(4)]
)
def test_a_call_refuses_a_tensor_that_it_cannot_read(wrong):
    good = torch.zeros(1, 4, 1)
    with pytest.raises(ValueError, match="linear_recurrence: argument 1 must be a contiguous torch.float32 tensor on the CPU"):
        native.call("linear_recurrence", torch.float32, good, wrong, None, good, 1, 1, 4, 1)


@built
def test_half_precision_and_strided_inputs_come_out_right():
    u, dt, A, B, C, D = inputs()
    want, _ = selective_scan(u.bfloat16(), dt, A, B, C, D)
    assert want.dtype == torch.bfloat16
    torch.testing.assert_close(want, selective_scan(u.bfloat16().float(), dt, A, B, C, D)[0].bfloat16())
    strided = u.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous() and torch.equal(selective_scan(strided, dt, A, B, C, D)[0], selective_scan(u, dt, A, B, C, D)[0])


@built
def test_results_are_bit_equal_at_any_number_of_threads():
    args = [t.requires_grad_() for t in inputs(B=3, L=50, D=300)]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, last = selective_scan(*args)
            results.append([y, last, *torch.autograd.grad(y.sum() + last.sum(), args)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _in_a_child(queue) -> None:
    queue.put(float(selective_scan(*inputs())[0].sum()))


@built
def test_a_forked_process_computes_after_its_parent_has():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want = float(selective_scan(*inputs())[0].sum())
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=_in_a_child, args=(queue,))
        child.start()
        child.join(60)
        assert child.exitcode == 0, "the child hangs or died"
        assert queue.get() == want
    finally:
        child.kill()
        torch.set_num_threads(before)


@built
@pytest.mark.parametrize("level", compiler.LEVELS)
def test_every_instruction_set_that_this_processor_has_agrees(level, monkeypatch):
    if level not in compiler.levels_here():
        pytest.skip(f"this processor has no {level}")
    want = [
        selective_scan(*inputs())[0],
        linear_recurrence(torch.rand(2, 9, 21, generator=torch.Generator().manual_seed(1)), torch.ones(2, 9, 21))[0],
    ]
    code = (
        "import ctypes, torch; from lab.ops import linear_recurrence, native, selective_scan; from test_native import inputs\n"
        f"native.LIBRARY = ctypes.CDLL(str(native.FOLDER / 'cpu_{level}.so')); native.VECTOR_BYTES = native.LIBRARY.vector_bytes()\n"
        "a = torch.rand(2, 9, 21, generator=torch.Generator().manual_seed(1))\n"
        "torch.save([selective_scan(*inputs())[0], linear_recurrence(a, torch.ones(2, 9, 21))[0]], 'out.pt')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    for got, expected in zip(torch.load("out.pt", weights_only=True), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_without_the_library_the_torch_backend_computes(monkeypatch, caplog):
    args = inputs()
    want, _ = selective_scan(*args)
    monkeypatch.setattr(native, "LIBRARY", None)
    monkeypatch.setattr(native, "SAYS", "the C++ kernels are not built")
    got, _ = selective_scan(*args)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="selective_scan: no forced backend .*native: the C\\+\\+ kernels are not built"), use("native"):
        selective_scan(*args)


@built
def test_operators_pass_opcheck_and_compile_in_one_graph():
    from lab.ops.linear_recurrence import forward_op

    a, x, h0 = torch.rand(2, 9, 5), torch.randn(2, 9, 5), torch.randn(2, 5)
    for backend in ("native", "torch"):
        torch.library.opcheck(forward_op, (a.requires_grad_(), x.requires_grad_(), h0.requires_grad_(), backend))
    layer = MambaLayer(16, d_state=4)
    x = torch.randn(2, 12, 16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
