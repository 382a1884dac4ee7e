"""Shared by the tests of ops: a backend against the float64 reference, values and gradients."""

from __future__ import annotations

import torch

from lab import ops
from lab.ops import native, use

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}  # of the largest value


def numbers(*shape, dtype, g):
    return torch.randn(*shape, generator=g, dtype=dtype)


def of(op) -> list[str]:
    """The backends of an op that are here, but for the reference. Without a compiler there is no native one; Triton needs a GPU, and
    test_triton.py simulates one."""
    here = {"reference": False, "native": native.LIBRARY is not None, "triton": False}
    return [name for name in ops.ops()[op.__name__] if here.get(name, True)]


def compare(op, name, args, dtype, call=None, device="cpu"):
    """The backend `name` in `dtype` on `device` against the reference in float64 on the CPU, on the same numbers."""
    exact = [t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_() for t in args]
    args = [t.detach().to(device).requires_grad_() for t in args]
    g = torch.Generator().manual_seed(9)
    results = []
    for backend, inputs in (("reference", exact), (name, args)):
        with use(**{op.__name__: backend}):
            out = (call or op)(*inputs)
        g.manual_seed(9)
        loss = sum((numbers(*y.shape, dtype=torch.float64, g=g).to(y.device) * (y.real if y.is_complex() else y)).sum() for y in out)
        results.append([t.cpu() for t in (*out, *torch.autograd.grad(loss, inputs, materialize_grads=True))])
    for i, (want, got) in enumerate(zip(*results, strict=True)):
        assert got.dtype in (dtype.to_real(), dtype.to_complex()), i
        scale = want.detach().abs().max() if want.numel() else 1
        atol = float(TOLERANCE[dtype.to_real()] * (scale + 1e-30))
        torch.testing.assert_close(got.to(want.dtype), want, rtol=0, atol=atol, msg=lambda text, i=i: f"{i}: {text}")
