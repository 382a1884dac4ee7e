"""The matrices that state spaces start with: HiPPO by its formulas, and what becomes of it in pairs of eigenvalues."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from lab.layers.hippo import LEAST, Hippo, InitMethod, diagonalise, eigenvalues, hippo, low_rank

METHODS = get_args(InitMethod)


@pytest.mark.parametrize("method", get_args(Hippo))
@pytest.mark.parametrize("N", [2, 4, 16, 64])
def test_hippo_is_normal_but_for_its_low_rank_part(method, N):
    A, B, P = hippo(method, N)
    one = torch.eye(N, dtype=torch.float64)
    skew = A + P.T @ P + (0.5 * one if method == "legs" else 0)
    torch.testing.assert_close(skew, -skew.T, rtol=0, atol=1e-12)
    diagonal = diagonalise(method, N)
    V, eigen = (torch.cat([t, t.conj()], -1) for t in (diagonal.V, diagonal.eigenvalues))  # both of each pair
    torch.testing.assert_close(V.mH @ V, one.to(V.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(V @ eigen.diag() @ V.mH, (A + P.T @ P).to(V.dtype), rtol=0, atol=1e-11)
    torch.testing.assert_close(2 * (diagonal.V @ diagonal.B).real, B)
    torch.testing.assert_close(2 * (diagonal.P @ diagonal.V.T).real, P)
    assert (diagonal.eigenvalues.imag >= 0).all()


def test_hippo_by_its_formulas():
    N = 6
    for method in get_args(Hippo):
        A, B, _ = hippo(method, N)
        for i in range(N):
            root = math.sqrt(2 * i + 1)
            assert B[i] == pytest.approx(
                {"legs": root, "legt": root / 2, "fourier": [1, 0, 2**0.5][min(i, i % 2 or 2)] if i else 1}[method]
            )
            for k in range(N):
                scale = root * math.sqrt(2 * k + 1)
                legs = -scale if i > k else -(i + 1) if i == k else 0
                legt = -scale / 2 * ((-1) ** (i - k) if i < k else 1)
                turn = math.pi * (i // 2) * (i - k) if i // 2 == k // 2 else 0  # the sine grows with the cosine, and takes from it
                assert A[i, k] == pytest.approx({"legs": legs, "legt": legt, "fourier": turn - float(B[i] * B[k])}[method])


def test_a_window_of_time_is_what_legt_and_fourier_remember():
    """x' = A x + B u holds the last two units of time at their scale: an impulse that is older is forgotten, a younger one is not."""
    for method, left in (("legt", 0.01), ("fourier", 0.3)):  # Fourier at the price of ripples where the window ends
        A, B, _ = hippo(method, 64)
        new, young, old = (float((torch.linalg.matrix_exp(A * age) @ B).norm()) for age in (0.5, 1.5, 3.0))
        assert young > 0.8 * new and old < left * young


@pytest.mark.parametrize("N", [2, 8, 64])
def test_eigenvalues_by_their_formulas(N):
    n = torch.arange(N // 2, dtype=torch.float64)
    expected = {
        "lin": (-0.5, math.pi * n),
        "fourier": (-0.5, math.pi * n),
        "inv": (-0.5, N / math.pi * (N / (2 * n + 1) - 1)),
        "real": (-(n + 1.0), 0.0 * n),
    }
    for method, (re, im) in expected.items():
        got = eigenvalues(method, N)
        torch.testing.assert_close(got.real, torch.as_tensor(re, dtype=torch.float64).expand(N // 2))
        torch.testing.assert_close(got.imag, im)
    for method in ("legs", "legt"):  # against a general solver
        A, _, P = hippo(method, N)
        want = torch.linalg.eigvals(A + P.T @ P).imag.sort().values[N // 2 :]
        got = eigenvalues(method, N)
        assert (got.real == -0.5).all()
        torch.testing.assert_close(got.imag.sort().values, want, rtol=1e-9, atol=1e-9)
    assert len({tuple(eigenvalues(method, 8).tolist()) for method in METHODS}) == len(METHODS) - 1  # lin and fourier are one


def test_random_eigenvalues_are_drawn():
    torch.manual_seed(0)
    first, second = (eigenvalues("random", 4000) for _ in range(2))
    assert not torch.equal(first, second) and (first.imag > 0).all()
    assert -1 <= first.real.min() < -0.99 and -0.02 < first.real.max() <= -LEAST and abs(first.real.mean() + 0.5) < 0.03
    assert abs(first.imag.log().mean()) < 0.1 and abs(first.imag.log().std() - 1) < 0.1
    torch.manual_seed(0)
    torch.testing.assert_close(low_rank("random", 4000).eigenvalues, first, rtol=0, atol=0)
