"""The CUDA kernels without a GPU: compiled for the host, where a loop over blocks and threads runs them behind the ops as they are."""

from __future__ import annotations

import contextlib
import ctypes
import re
from types import SimpleNamespace

import pytest
import torch
from op_checks import compare, numbers
from test_native import NATIVE, example, larger, results, same
from test_s4 import poles, scanned, system
from test_scans import recurrence_inputs, scan_inputs
from torch._subclasses.fake_tensor import FakeTensorMode

from lab import compiler
from lab.ops import cauchy_kernel, causal_conv, dplr_scan, fft_conv, kuramoto_scan, linear_recurrence, native, selective_scan, ssm_kernel
from lab.ops.dplr_scan import DPLR_SCAN, HIGHEST_RANK, MOST_PAIRS
from lab.ops.fft_conv import FFT_CONV

SOURCES = [file for file in compiler.cuda_sources() if file.suffix == ".cu"]
has_compiler = pytest.mark.skipif(compiler.compiler_version() is None, reason=f"there is no C++ compiler {compiler.compiler()!r} here")


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    """csrc/cuda by the C++ compiler, where csrc/cuda/grid.h runs one thread after the other."""
    target = tmp_path_factory.mktemp("cuda") / "host.so"
    compile_for_the_host(target, SOURCES)
    return ctypes.CDLL(str(target))


def compile_for_the_host(target, sources, *options):
    compiler.compile_library(sources, target, list(compiler.LEVELS)[-1], ["-O0", "-Wall", "-Wno-unknown-pragmas", *options, "-x", "c++"])


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
@pytest.mark.parametrize(("H", "R", "N", "L"), [(1, 1, 1, 1), (2, 4, 5, 2), (3, 2, 33, 31), (2, 6, 16, 300)])
def test_cauchy_kernel(on_the_host, H, R, N, L, dtype):
    compare(cauchy_kernel, "native", poles(H, R, N, dtype), dtype, call=lambda w, v: (cauchy_kernel(w, v, L),))


@has_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize(
    ("B", "L", "D", "n", "r"),
    [(1, 1, 1, 1, 1), (2, 0, 3, 2, 1), (0, 4, 3, 2, 1), (3, 33, 37, 3, 2), (2, 32, 17, 33, 1), (3, 50, 3, 7, 4), (1, 3, 2, 129, 3)],
)
def test_dplr_scan(on_the_host, B, L, D, n, r, ragged, dtype):
    compare(dplr_scan, "native", system(B, L, D, n, r, dtype), dtype, call=scanned(B, L, ragged))


@has_compiler
def test_dplr_scan_takes_what_it_says(on_the_host):
    for dtype, pairs in MOST_PAIRS.items():
        compare(dplr_scan, "native", system(1, 2, 1, pairs, HIGHEST_RANK, dtype), dtype)
        with pytest.raises(AssertionError, match=r"^1\b"):  # the launch is refused
            dplr_scan(*system(1, 2, 1, pairs + 4, 1, dtype))


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
@pytest.mark.parametrize("form", ["lattice", "mesh"])
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 0, 3), (1, 7, 2), (5, 17, 7), (20, 9, 12), (2, 3, 300)], ids=str)
def test_kuramoto_scan(on_the_host, shape, form, dtype):
    B, L, H = shape
    g = torch.Generator().manual_seed(0)
    sizes = (B, H), (B, L, H), (H,), (H,), (H, H)
    args = [numbers(*size, dtype=torch.float64, g=g).to(dtype) for size in sizes]
    args[-1] /= H
    args[1] *= 10 if form == "mesh" else 1  # many steps are clipped

    def points(*args):
        theta, last = kuramoto_scan(*args, 0.2, form=form)
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


# The sources, and the library that is built of them


def functions(files, last):
    """{name of a function: (its parameters but for `last`, the types that it is defined for)}"""
    found = {}
    for file in files:
        text = re.sub(r"\s+", " ", file.read_text().replace("\\\n", " "))
        dtypes = set(re.findall(r"DEFINE\((\w+), (?:float|double)\b", text))
        for name, parameters in re.findall(r"EXPORT (?:void|int64_t) (\w+)_##NAME\( ?(.*?)\) \{", text):
            assert parameters.endswith(f", int64_t {last}"), name
            found[name] = (parameters.removesuffix(f", int64_t {last}"), dtypes)
    return found


def test_every_native_op_has_a_launcher_like_its_twin_on_the_cpu():
    twins = functions((compiler.ROOT / "csrc" / "cpu").glob("*.cpp"), "threads")
    launchers = functions(SOURCES, "stream")
    for op in NATIVE:
        for name in (op.name, f"{op.name}_backward"):
            assert launchers[name] == twins[name]
            assert {"float32", "float64"} <= launchers[name][1]


@has_compiler
def test_a_library_of_other_sources_is_not_loaded(tmp_path):
    assert native.load_cuda(tmp_path)[1].startswith("the CUDA kernels are not built: ")
    (library,) = (file for file in SOURCES if file.name == "library.cu")
    compile_for_the_host(tmp_path / "cuda.so", [library], f'-DLAB_SOURCES="{compiler.digest([library])}"', '-DLAB_ARCHITECTURES="sm_80"')
    loaded, says = native.load_cuda(tmp_path, [library])
    assert native.made_of(loaded)["compiler"] == "for the host" and says == "sm_80"
    loaded, says = native.load_cuda(tmp_path)
    assert loaded is None and says.startswith("cuda.so was built from other sources than csrc/ holds now; LAB_CUDA=1 ")


def test_an_old_driver_and_an_old_gpu_are_reasons(monkeypatch):
    library = SimpleNamespace(made_of=lambda: b"0|nvcc 13.0|sm_80, sm_90", old_driver=lambda: 12040)
    assert native._for_the_driver(library) == (None, "cuda.so was built by nvcc 13.0, the driver here goes up to CUDA 12.4")
    library.old_driver = lambda: 0
    assert native._for_the_driver(library) == (library, "sm_80, sm_90")
    assert native._too_old(0) is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5 + index))
    assert native._too_old(0) == "cuda:0 has sm_75, the CUDA kernels need sm_80"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert native._too_old(0) is None


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is elsewhere."""

    device = torch.device("cuda:1")


def test_a_call_takes_the_stream_of_its_device_and_an_error_is_one_sentence(monkeypatch):
    guarded, given, errors = [], [], [0, 98]
    run = lambda *values: given.append([value and value.value for value in values]) or errors.pop(0)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "device", lambda device: guarded.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(native, "function", lambda name, device: run if (name, device) == ("twice_float32", "cuda") else None)
    monkeypatch.setattr(native, "error_text", lambda error: f"invalid device function {error}")
    x = torch.zeros(3).as_subclass(OnGpu)
    native.call("twice", torch.float32, x, None, 3, work=1)
    assert given == [[x.data_ptr(), None, 3, 77]] and guarded == [OnGpu.device]
    with pytest.raises(RuntimeError, match="^twice: the CUDA kernel did not start on cuda:1: invalid device function 98$"):
        native.call("twice", torch.float32, x, None, 3, work=1)
    with pytest.raises(ValueError, match="twice: argument 1 must be a contiguous torch.float32 tensor on cuda:1, got torch.float32 on cpu"):
        native.call("twice", torch.float32, x, torch.zeros(3), 3, work=1)
    assert len(given) == 2


def test_what_a_gpu_does_not_take_is_a_reason(monkeypatch):
    monkeypatch.setattr(native, "CUDA", object())
    supports = FFT_CONV.backends[0].supports
    with FakeTensorMode(), torch.device("cuda"):
        for dtype, longest in ((torch.float32, 8192), (torch.float64, 4096)):
            assert supports(torch.empty(1, longest, 2, dtype=dtype), torch.empty(2, longest, dtype=dtype), None) is None
            reason = supports(torch.empty(1, longest + 1, 2, dtype=dtype), torch.empty(2, 5, dtype=dtype), None)
            assert reason.startswith(f"on a GPU it takes {longest} steps of {dtype}, which fit ")
        supports = DPLR_SCAN.backends[0].supports
        assert supports(*DPLR_SCAN.example()) is None
        for pairs, rank in ((257, 1), (3, 5)):
            state, low = (2, pairs, 2), (rank, 2, pairs, 2)
            sizes = (1, 4, 2), (1, *state), state, low, low, state, state
            reason = supports(*(torch.empty(size, dtype=torch.float64) for size in sizes), None)
            assert reason == "on a GPU it takes 256 pairs of torch.float64 and rank 4, which fit into a block"
        assert native.why_not(torch.empty(2), torch.empty(2, device="cpu")) == "its tensors are on cuda:0 and cpu"
        assert native.why_not(torch.empty(2, dtype=torch.half)).startswith("torch.float16 is not among ")
    monkeypatch.setattr(native, "CUDA", None)
    with FakeTensorMode(), torch.device("cuda"):
        assert native.why_not(torch.empty(2)) == native.CUDA_SAYS


def test_an_installation_compiles_them_where_they_can_run_or_are_asked_for(monkeypatch):
    monkeypatch.delenv("LAB_CUDA", raising=False)
    monkeypatch.setattr(compiler, "nvcc", lambda: "/bin/nvcc")
    monkeypatch.setattr(compiler, "gpu_here", lambda: True)
    assert compiler.why_no_cuda() is None
    monkeypatch.setenv("LAB_CUDA", "0")
    assert compiler.why_no_cuda() == "LAB_CUDA=0 leaves them out"
    monkeypatch.setattr(compiler, "gpu_here", lambda: False)
    monkeypatch.delenv("LAB_CUDA")
    assert compiler.why_no_cuda() == "this machine shows no GPU; LAB_CUDA=1 asks for them all the same"
    monkeypatch.setenv("LAB_CUDA", "1")
    assert compiler.why_no_cuda() is None
    monkeypatch.setattr(compiler, "nvcc", lambda: None)
    assert compiler.why_no_cuda() == "there is no nvcc on the path or in CUDA_HOME"


@pytest.mark.slow
@pytest.mark.skipif(compiler.nvcc() is None, reason="there is no nvcc here")
def test_nvcc_compiles_them_and_a_launch_reports_its_error(tmp_path):
    compiler.compile_cuda(SOURCES, tmp_path / "cuda.so", [f'-DLAB_SOURCES="{compiler.digest(compiler.cuda_sources())}"'])
    library, says = native.load_cuda(tmp_path)
    assert says == "sm_80, sm_90"
    for name in functions(SOURCES, "stream"):
        assert hasattr(library, f"{name}_float32") and hasattr(library, f"{name}_float64")
    library.error_text.restype = ctypes.c_char_p
    for L, expected in ((0, "no error"), (1, None)):  # no blocks, nothing is started
        error = library.ssm_kernel_float32(None, None, None, *map(ctypes.c_int64, (1, 0, L, 0)))
        text = library.error_text(ctypes.c_int64(error)).decode()
        assert text == expected or (L and (text == "no error") == torch.cuda.is_available()), text
