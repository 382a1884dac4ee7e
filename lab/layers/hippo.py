"""State matrices that remember: HiPPO-LegS, LegT and Fourier, their diagonal forms, and the other initialisations of S4D.

The state of a polynomial memory obeys x' = A x + B u. Each A is normal plus low rank: with the rows p of P, A + sum p p^T = rho I + a skew
matrix, which a unitary V diagonalises. Eigenvalues come in conjugate pairs; one of each pair is kept, and a result takes twice the real
part of the sum over them. Sources: LegS, LegT arXiv:2008.07669; Fourier and the scale of LegT arXiv:2206.12037; P arXiv:2111.00396,
appendix C.1; the diagonal forms arXiv:2206.11893, section 4.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

Hippo: TypeAlias = Literal["legs", "legt", "fourier"]
InitMethod: TypeAlias = Literal["legs", "legt", "fourier", "lin", "inv", "real", "random"]

LEAST = 1e-2  # decay of a normal part that has none: in float32 a sum over poles on the axis would lose its digits


class Diagonal(NamedTuple):
    """complex128; n = N / 2, the eigenvalues with an imaginary part of 0 or more."""

    eigenvalues: Tensor  # (n,)
    V: Tensor  # (N, n), their eigenvectors
    B: Tensor  # (n,), V* B
    P: Tensor  # (r, n), V* p: the low-rank part that the diagonal form leaves out


def hippo(method: Hippo, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (N, N), B (N,) and P (r, N), float64.

    legs     A_nk = -sqrt((2n+1)(2k+1)) for n > k, -(n+1) on the diagonal, 0 above;  B_n = sqrt(2n+1);  rho = -1/2
    legt     A_nk = -1/2 sqrt((2n+1)(2k+1)) ((-1)^(n-k) for n < k, else 1);  B_n = 1/2 sqrt(2n+1);  rho = 0
    fourier  a cosine and a sine of frequency j in the states 2j and 2j+1: rotation by pi j, less B B^T;  B = (1, 0, sqrt2, 0, ..);  rho = 0
    """
    n = torch.arange(N, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    even = n % 2 == 0
    if method == "legs":
        return -(torch.tril(root[:, None] * root, -1) + torch.diag(n + 1)), root, (n + 0.5).sqrt()[None]
    if method == "legt":
        sign = torch.where(n[:, None] < n, 1 - 2 * ((n[:, None] - n) % 2), 1.0)
        return -0.5 * root[:, None] * root * sign, 0.5 * root, root / math.sqrt(2) * torch.stack([even, ~even])
    B = math.sqrt(2) * even.double()
    B[0] = 1.0
    turn = torch.zeros(N, dtype=torch.float64)
    turn[::2] = math.pi * (n[::2] / 2)
    return torch.diag(turn[:-1], -1) - torch.diag(turn[:-1], 1) - B[:, None] * B, B, B[None]


def diagonalise(method: Hippo, N: int) -> Diagonal:
    """The normal part of a HiPPO matrix. N even."""
    _check_even(N)
    A, B, P = hippo(method, N)
    rho = -0.5 if method == "legs" else 0.0
    skew = A + P.T @ P - rho * torch.eye(N)
    frequencies, V = torch.linalg.eigh(-1j * skew)  # ascending; the upper half is positive
    frequencies, V = frequencies[N // 2 :], V[:, N // 2 :]
    if method == "fourier":  # frequency 0 twice: of its vectors take a pair of conjugates, as all others are
        frequencies[0], V[:, 0] = 0.0, 0.0
        V[0, 0], V[1, 0] = math.sqrt(0.5), 1j * math.sqrt(0.5)
    return Diagonal(torch.complex(torch.full_like(frequencies, rho), frequencies), V, V.mH @ B.to(V.dtype), P.to(V.dtype) @ V.conj())


def eigenvalues(method: InitMethod, N: int) -> Tensor:
    """(N / 2,) complex128, what a diagonal layer with N states in conjugate pairs starts from.

    legs, legt, fourier: -1/2 + i frequency, those of the normal part (LegT and Fourier owe all of their decay to the part that is left
    out); lin: -1/2 + i pi n, which are the frequencies of fourier; inv: -1/2 + i (N/pi) (N/(2n + 1) - 1); real: -(n + 1); random: the
    control, -max(U(0, 1), LEAST) + i exp(N(0, 1)), drawn from the global stream.
    """
    _check_even(N)
    n = torch.arange(N // 2, dtype=torch.float64)
    half = torch.full_like(n, -0.5)
    match method:
        case "legs" | "legt" | "fourier":
            return torch.complex(half, diagonalise(method, N).eigenvalues.imag)
        case "lin":
            return torch.complex(half, math.pi * n)
        case "inv":
            return torch.complex(half, N / math.pi * (N / (2 * n + 1) - 1))
        case "real":
            return torch.complex(-(n + 1), torch.zeros_like(n))
        case "random":
            return torch.complex(-torch.rand_like(n).clamp(min=LEAST), torch.randn_like(n).exp())
    raise ValueError(f"init_method={method!r}; expected {', '.join(get_args(InitMethod))}")


class LowRank(NamedTuple):
    """A = diag(eigenvalues) - sum over the rows p of P of p p*, complex128; n = N / 2, one of each pair."""

    eigenvalues: Tensor  # (n,)
    B: Tensor  # (n,)
    P: Tensor  # (r, n)


def low_rank(method: InitMethod, N: int) -> LowRank:
    """What a layer whose matrix is diagonal plus low rank starts from, with N states in conjugate pairs.

    legs, legt (r = 2), fourier: the HiPPO matrix itself, but for a real part of LEAST where rho = 0. lin, inv, real, random: the
    eigenvalues of the diagonal forms, B = 1, and P = B, as in HiPPO-Fourier: P = 0 would never learn, its gradient is 0.
    """
    if method in ("legs", "legt", "fourier"):
        found = diagonalise(method, N)
        return LowRank(torch.complex(found.eigenvalues.real.clamp(max=-LEAST), found.eigenvalues.imag), found.B, found.P)
    diagonal = eigenvalues(method, N)
    return LowRank(diagonal, torch.ones_like(diagonal), torch.ones_like(diagonal)[None])


def _check_even(N: int) -> None:
    if not isinstance(N, Integral) or N < 2 or N % 2:
        raise ValueError(f"d_state={N!r} counts states in conjugate pairs: it must be even and at least 2")
