"""The C++ kernels as a library: what is loaded, what a call refuses, threads, forks, and the build."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lab import compiler, ops
from lab.mixers import MambaLayer
from lab.ops import causal_conv, kuramoto_scan, linear_recurrence, native, selective_scan, use

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
        native.call("linear_recurrence", torch.float32, good, wrong, None, good, 1, 1, 4, 1, work=1)


@built
def test_a_call_refuses_a_conjugate_that_is_only_marked_as_one():
    good = torch.zeros(1, 4, 1, dtype=torch.complex64)
    with pytest.raises(ValueError, match="linear_recurrence: argument 1 must be a contiguous torch.complex64 tensor"):
        native.call("linear_recurrence", torch.complex64, good, good.conj(), None, good, 1, 1, 4, 2, work=1)


@built
def test_half_precision_and_strided_inputs_come_out_right():
    u, dt, A, B, C, D = inputs()
    want, _ = selective_scan(u.bfloat16(), dt, A, B, C, D)
    assert want.dtype == torch.bfloat16
    torch.testing.assert_close(want, selective_scan(u.bfloat16().float(), dt, A, B, C, D)[0].bfloat16())
    strided = u.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous() and torch.equal(selective_scan(strided, dt, A, B, C, D)[0], selective_scan(u, dt, A, B, C, D)[0])


@pytest.fixture
def threads():
    """Sets torch's number of threads; afterwards it is what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def threads_for_all(threads, monkeypatch):
    """The same, and small calls take all the threads too."""
    monkeypatch.setattr(native, "GRAIN", 1)
    return threads


@built
def test_a_decode_step_keeps_to_one_thread_and_a_long_scan_takes_them_all(threads, monkeypatch):
    threads(3)
    given, call = [], native._call
    monkeypatch.setattr(native, "_call", lambda *args: given.append(args[-1]) or call(*args))
    selective_scan(*inputs(B=1, L=1, D=512, N=16))
    causal_conv(torch.randn(1, 1, 512), torch.randn(4, 512))
    linear_recurrence(torch.rand(1, 1, 512), torch.randn(1, 1, 512))
    kuramoto_scan(torch.zeros(64), torch.randn(1, 1, 64), torch.zeros(64), torch.ones(64), torch.randn(64, 64), 0.1)
    assert given == [1, 1, 1, 1]
    selective_scan(*inputs(B=2, L=256, D=256, N=16))
    assert given[4:] == [3]


def test_each_thread_has_a_grain_to_do(threads):
    threads(4)
    grain = native.GRAIN
    assert [native.threads_for(work) for work in (0, grain, 2 * grain - 1, 2 * grain, 3 * grain, 99 * grain)] == [1, 1, 1, 2, 3, 4]


def _in_a_child(queue) -> None:
    queue.put(float(selective_scan(*inputs())[0].sum()))


@built
def test_a_forked_process_computes_after_its_parent_has(threads_for_all):
    threads_for_all(2)
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


def test_without_the_library_the_torch_backend_computes(monkeypatch, caplog):
    args = inputs()
    want, _ = selective_scan(*args)
    monkeypatch.setattr(native, "LIBRARY", None)
    monkeypatch.setattr(native, "SAYS", "the C++ kernels are not built")
    got, _ = selective_scan(*args)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="selective_scan: no forced backend .*native: the C\\+\\+ kernels are not built"), use("native"):
        selective_scan(*args)


# What every op with a native backend keeps to, on its own small example and, where the layout of the work matters, on a larger one.

NATIVE = [op for op in ops.every() if "native" in ops.ops()[op.name] and op.name != "decode"]  # that one gives an iterator
every_native_op = pytest.mark.parametrize("op", NATIVE, ids=lambda op: op.name)


def example(op) -> list:
    torch.manual_seed(0)
    return [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in op.example()]


LARGER = {  # whole vectors and a rest, several tiles, groups and parts of a row
    "causal_conv": lambda: (torch.randn(2, 130, 203), torch.randn(4, 203), torch.randn(203), torch.randn(2, 6, 203), 2),
    "cauchy_kernel": lambda: (-torch.rand(5, 11, 2) - 0.1, torch.randn(5, 7, 11, 2), 1030),
    "dplr_scan": lambda: (
        torch.randn(2, 70, 43),
        torch.randn(2, 43, 5, 2),
        -torch.rand(43, 5, 2),
        *(0.1 * torch.randn(2, 2, 43, 5, 2)),
        *torch.randn(2, 43, 5, 2),
        None,
    ),
    "fft_conv": lambda: (torch.randn(2, 130, 203), torch.randn(203, 130), torch.randn(203)),
    "kuramoto_scan": lambda: (
        torch.rand(6, 43),
        2 * torch.randn(6, 30, 43),
        torch.randn(43),
        torch.randn(43),
        torch.randn(43, 43) / 43,
        1.0,
        "mesh",
    ),
    "linear_recurrence": lambda: (torch.rand(2, 130, 203), torch.randn(2, 130, 203), torch.randn(2, 203)),
    "selective_scan": lambda: (*inputs(B=1, L=130, D=203, N=23), torch.randn(1, 203, 23)),
    "ssm_kernel": lambda: (-torch.rand(5, 11, 2), torch.randn(5, 11, 2), 1030),
}


def larger(op) -> list:
    torch.manual_seed(0)
    return [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in LARGER[op.name]()]


small_and_larger = pytest.mark.parametrize("arguments", [example, larger])


def results(op, args) -> list[torch.Tensor]:
    """What it returns, and the gradients of all of it."""
    out = op(*args)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    wanted = [t for t in args if isinstance(t, torch.Tensor)]
    return [*out, *torch.autograd.grad(sum((y * y).sum() for y in out), wanted, materialize_grads=True)]


def same(got, want) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture
def native_only():
    with use("native"):
        yield


@built
@every_native_op
@small_and_larger
@pytest.mark.parametrize("level", compiler.LEVELS)
def test_every_instruction_set_that_this_processor_has_agrees(op, level, arguments, native_only, monkeypatch):
    if level not in compiler.levels_here():
        pytest.skip(f"this processor has no {level}")
    args = arguments(op)
    want = results(op, args)
    native.function.cache_clear()
    try:
        monkeypatch.setattr(native, "LIBRARY", ctypes.CDLL(str(native.FOLDER / f"cpu_{level}.so")))
        for got, expected in zip(results(op, args), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * max(1, float(expected.detach().abs().max())))
    finally:
        native.function.cache_clear()


@built
@every_native_op
def test_layouts_do_not_matter(op, native_only):
    args = example(op)
    want = results(op, args)
    strided = [t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() if isinstance(t, torch.Tensor) else t for t in args]
    assert not any(t.is_contiguous() for t in strided if isinstance(t, torch.Tensor)) and same(results(op, strided), want)
    rows = [t.detach()[:1] if isinstance(t, torch.Tensor) and t.ndim > 1 else t for t in args]
    expanded = [t.expand_as(full) if isinstance(t, torch.Tensor) else t for t, full in zip(rows, args, strict=True)]
    copied = [t.clone(memory_format=torch.contiguous_format) if isinstance(t, torch.Tensor) else t for t in expanded]
    with torch.no_grad():
        got, want = op(*expanded), op(*copied)
    assert same(*([out] if isinstance(out, torch.Tensor) else out for out in (got, want)))


@built
@every_native_op
@small_and_larger
def test_results_and_gradients_are_bit_equal_at_any_number_of_threads(op, arguments, native_only, threads_for_all):
    args, by_threads = arguments(op), []
    for number in (1, 2, 5):
        threads_for_all(number)
        by_threads.append(results(op, args))
    assert same(by_threads[1], by_threads[0]) and same(by_threads[2], by_threads[0])


@built
@every_native_op
@small_and_larger
def test_everything_that_is_returned_has_been_written(op, arguments, native_only, monkeypatch):
    args = arguments(op)
    want = results(op, args)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # a training of another test has set it to False
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        assert torch.empty(1).isnan()
        assert same(results(op, args), want)
    finally:
        torch.use_deterministic_algorithms(False)


class Record(TorchDispatchMode):
    """The operators of lab that ran, with what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lab":
            self.calls.setdefault(func, args)
        return func(*args, **(kwargs or {}))


@built
@every_native_op
def test_opcheck_of_the_operator_and_of_its_gradient(op, native_only):
    with Record() as record:
        results(op, example(op))
    assert len(record.calls) == 2, "the backward pass is an operator too"
    for i, (operator, args) in enumerate(record.calls.items()):
        given = pytree.tree_map_only(torch.Tensor, lambda t, first=not i: t.detach().clone().requires_grad_(first), args)
        torch.library.opcheck(operator, given)


@built
@every_native_op
def test_compiled_checkpointed_and_under_autocast_it_is_the_same(op, native_only):
    args = example(op)
    want = results(op, args)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for call in (compiled, partial(checkpoint, op, use_reentrant=False)):
        for a, b in zip(results(call, args), want, strict=True):
            torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(results(op, args), want)


@built
@every_native_op
def test_a_second_backward_raises(op, native_only):
    args = example(op)
    out = op(*args)
    first = out if isinstance(out, torch.Tensor) else out[0]
    (grad,) = torch.autograd.grad((first * first).sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op.name}: .*no second derivative"):
        grad.sum().backward()


class Scanned(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        return selective_scan(*inputs())[0].sum() + i


@built
def test_forked_loader_workers_compute_after_their_parent_has(threads_for_all):
    threads_for_all(2)
    want = selective_scan(*inputs())[0].sum()
    loader = torch.utils.data.DataLoader(Scanned(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), want + torch.arange(4))


def test_a_module_that_is_read_again_registers_again():
    code = (
        "import importlib, torch, warnings; from lab import ops; warnings.simplefilter('error')\n"
        "for name in ops.ops():\n"
        "    importlib.reload(importlib.import_module(f'lab.ops.{name}'))\n"
        "for op in ops.every():\n"
        "    args = [t.requires_grad_() if isinstance(t, torch.Tensor) and t.dtype != torch.long else t for t in op.example()]\n"
        "    y = op(*args); (y if isinstance(y, torch.Tensor) else y[0]).sum().backward()\n"
        "    assert args[0].grad is not None and ops.used()[op.name]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@built
def test_a_layer_compiles_in_one_graph():
    layer, x = MambaLayer(16, d_state=4), torch.randn(2, 12, 16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
