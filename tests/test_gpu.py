"""On a GPU: every op and backend against the float64 reference on the CPU, the conformance of every model, and trainings.

`./scripts/test --gpu` runs them where there is a GPU, and skips them elsewhere; with `--device cpu` the same code runs without one.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import TINY
from op_checks import compare, numbers
from test_models import MODELS, L, V, conform, from_yaml, random_tokens
from test_ops import circle
from test_ops import inputs as oscillators
from test_scans import recurrence_inputs, scan_inputs

from lab import ops
from lab.analysis import conformance
from lab.config import compose
from lab.models import initialise
from lab.models.create import ARCHITECTURES
from lab.ops import causal_conv, fft_conv, kuramoto_scan, linear_recurrence, selective_scan, ssm_kernel
from lab.training import evaluate_run, train

pytestmark = pytest.mark.gpu

OPS = {op.name: op for op in ops.every()}
BACKENDS = [(op.name, backend.name) for op in OPS.values() for backend in op.backends if backend.name != "reference"]


def backends(function) -> list[str]:
    return [name for op, name in BACKENDS if op == function.__name__]


def skip_without(op: str, name: str, device: str) -> None:
    """A backend that cannot run here is skipped with its own reason."""
    (backend,) = (backend for backend in OPS[op].backends if backend.name == name)
    with torch.device(device):
        reason = backend.supports(*OPS[op].example())
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


@pytest.mark.parametrize(("op", "name"), BACKENDS, ids="-".join)
def test_every_op_computes_its_formula(op, name, device):
    """By the op's own example, in float32."""
    skip_without(op, name, device)
    torch.manual_seed(0)
    exact = OPS[op].example()
    args = [t.to(device) if isinstance(t, torch.Tensor) else t for t in exact]
    (backend,) = (backend for backend in OPS[op].backends if backend.name == name)
    got = torch.utils._pytree.tree_leaves(backend.run(*args))
    want = torch.utils._pytree.tree_leaves(OPS[op].backends[-1].run(*exact))
    for y, expected in zip(got, want, strict=True):
        assert y.device.type == device
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)


DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("per_step", [True, False], ids=["per step", "constant"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 33, 17), (2, 130, 203)], ids=str)
@pytest.mark.parametrize("name", backends(linear_recurrence))
def test_linear_recurrence(name, shape, per_step, dtype, device):
    skip_without("linear_recurrence", name, device)
    compare(linear_recurrence, name, recurrence_inputs(shape, per_step, dtype), dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 16, 23])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 33, 17), (2, 130, 203)], ids=str)
@pytest.mark.parametrize("name", backends(selective_scan))
def test_selective_scan(name, shape, N, dtype, device):
    skip_without("selective_scan", name, device)
    compare(selective_scan, name, scan_inputs(shape, N, dtype), dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "N", "length"), [(1, 1, 1), (3, 5, 40), (2, 32, 1000)])
@pytest.mark.parametrize("name", backends(ssm_kernel))
def test_ssm_kernel(name, H, N, length, dtype, device):
    skip_without("ssm_kernel", name, device)
    g = torch.Generator().manual_seed(0)
    w = torch.stack([-0.2 * torch.rand(H, N, generator=g), 3 * torch.rand(H, N, generator=g)], -1)
    args = [t.to(dtype) for t in (w, numbers(H, N, 2, dtype=torch.float64, g=g))]
    compare(ssm_kernel, name, args, dtype, call=lambda w, c: (ssm_kernel(w, c, length),), device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "dilation"), [(1, 1), (4, 1), (3, 5)])
@pytest.mark.parametrize("name", backends(causal_conv))
def test_causal_conv(name, K, dilation, dtype, device):
    skip_without("causal_conv", name, device)
    g = torch.Generator().manual_seed(0)
    sizes = (2, 70, 33), (K, 33), (33,), (2, (K - 1) * dilation, 33)
    args = [numbers(*size, dtype=dtype, g=g) for size in sizes]
    compare(causal_conv, name, args, dtype, call=lambda x, w, b, state: causal_conv(x, w, b, dilation, state), device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 40, 1000])
@pytest.mark.parametrize("name", backends(fft_conv))
def test_fft_conv(name, length, dtype, device):
    skip_without("fft_conv", name, device)
    g = torch.Generator().manual_seed(0)
    args = [numbers(*size, dtype=dtype, g=g) for size in ((2, length, 5), (5, length), (5,))]
    compare(fft_conv, name, args, dtype, call=lambda u, K, D: (fft_conv(u, K, D),), device=device)


@pytest.mark.parametrize("shape", [(1, 7, 2), (5, 17, 7), (2, 40, 12)], ids=str)
@pytest.mark.parametrize("form", ["lattice", "mesh"])
@pytest.mark.parametrize("name", backends(kuramoto_scan))
def test_kuramoto_scan(name, form, shape, device):
    skip_without("kuramoto_scan", name, device)
    call = lambda *args: [circle(phases) for phases in kuramoto_scan(*args, 0.1, form=form)]  # noqa: E731
    compare(kuramoto_scan, name, oscillators(*shape), torch.float64, call=call, device=device)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_conforms(name, device):
    conform(lambda: from_yaml(name), device)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mamba_attention"])
def test_across_the_borders_of_chunks(name, device):
    model = from_yaml(name, seq_len=conformance.LONG)
    initialise(model, 0)
    conformance.randomise(model, 0)
    conformance.check_borders(model.to(device), random_tokens(3, conformance.LONG).to(device))


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_generates_what_it_does_on_the_cpu(name, device):
    model = from_yaml(name).eval()
    initialise(model, 0)
    conformance.randomise(model, 0)
    prompt = random_tokens(2, L)
    want = model(prompt)
    torch.testing.assert_close(model.to(device)(prompt.to(device)).cpu(), want, rtol=1e-4, atol=1e-4)
    new = model.generate(prompt.to(device), 5, temperature=1.0, top_k=4, generator=torch.Generator(device).manual_seed(0))
    assert new.shape == (2, L + 5) and new.device.type == device and int(new.max()) < V


def accelerator(device: str) -> str:
    return "gpu" if device == "cuda" else "cpu"


MAMBA = (
    *(word for word in TINY if not word.startswith(("model.mixer.", "model.dropout"))), "model=mamba", "model.mixer.d_state=4"
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")  # what the compiler imports
@pytest.mark.parametrize("words", [("precision=32-true",), ("precision=bf16-mixed",), ("precision=32-true", "compile=true")], ids="-".join)
@pytest.mark.parametrize("model", ["lot", "mamba"])
def test_a_training_is_evaluated(model, words, device, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shrunk = (*TINY, "model=lot") if model == "lot" else MAMBA
    trainer = (f"trainer.accelerator={accelerator(device)}", *(f"trainer.{word}" for word in words))
    train(compose([*shrunk, *trainer, "run_dir=run"]))
    document, _ = evaluate_run("run", [f"trainer.accelerator={accelerator(device)}"], [])
    assert document["metrics"]["ce_loss"] < 10 and document["backends"]


def test_a_training_goes_on_where_it_stopped(device, tiny, breaker):
    """The random states of the GPU are in the checkpoint: dropout draws from them."""
    words = ("model=lot", f"trainer.accelerator={accelerator(device)}")
    whole = torch.load(tiny(*words, run_dir="whole").last, weights_only=True)["state_dict"]
    with pytest.raises(RuntimeError, match="broken at step 8"):
        tiny(*words, *breaker(8))
    stopped = torch.load(tiny(*words, *breaker(8)).last, weights_only=True)["state_dict"]
    for name, weight in whole.items():
        torch.testing.assert_close(stopped[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["copy_reverse_small", "copy_reverse_small_vanilla"])
def test_copy_reverse_is_learnt_within_ten_minutes(name, device, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"experiment={name}", f"trainer.accelerator={accelerator(device)}", "run_dir=run"]
    subprocess.run([sys.executable, "-m", "lab.cli.train", *words], check=True, timeout=600)
    metrics = evaluate_run("run", [], [])[0]["metrics"]
    assert metrics["exact_match"] >= 0.99 and metrics["exact_match_free"] >= 0.99
