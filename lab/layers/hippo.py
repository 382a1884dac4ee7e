"""State matrices that remember: HiPPO-LegS (arXiv:2008.07669, theorem 2), its diagonal forms, and the other initialisations of S4D.

The state of a polynomial memory obeys x' = A x + B u. LegS is normal plus low rank (arXiv:2111.00396, appendix C.1): with
p_n = sqrt(n + 1/2), A + p p^T = -1/2 I + a skew matrix, which a unitary V diagonalises. Eigenvalues come in conjugate pairs; one of each
pair is kept, and a result takes twice the real part of the sum over them.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

InitMethod = Literal["legs", "lin", "inv", "real"]


class Diagonal(NamedTuple):
    """complex128; n = N / 2, the eigenvalues with positive imaginary part."""

    eigenvalues: Tensor  # (n,)
    V: Tensor  # (N, n), their eigenvectors
    B: Tensor  # (n,), V* B
    P: Tensor  # (n,), V* p: the low-rank part that the diagonal form leaves out


def legs(N: int) -> tuple[Tensor, Tensor]:
    """A (N, N) and B (N,) of HiPPO-LegS, float64."""
    n = torch.arange(N, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    return -(torch.tril(root[:, None] * root, -1) + torch.diag(n + 1)), root


def diagonal_legs(N: int) -> Diagonal:
    """The normal part of LegS, diagonalised. N even."""
    if N < 2 or N % 2:
        raise ValueError(f"LegS in conjugate pairs needs an even number of states, got {N}")
    A, B = legs(N)
    p = (torch.arange(N, dtype=torch.float64) + 0.5).sqrt()
    skew = A + p[:, None] * p + 0.5 * torch.eye(N, dtype=torch.float64)
    frequencies, V = torch.linalg.eigh(-1j * skew)  # ascending; the upper half is positive
    frequencies, V = frequencies[N // 2 :], V[:, N // 2 :]
    return Diagonal(torch.complex(torch.full_like(frequencies, -0.5), frequencies), V, V.mH @ B.to(V.dtype), V.mH @ p.to(V.dtype))


def eigenvalues(method: InitMethod, N: int) -> Tensor:
    """(N / 2,) complex128, for N states in conjugate pairs; source of all but `real`: arXiv:2206.11893, section 4.

    legs: those of LegS' normal part; lin: -1/2 + i pi n; inv: -1/2 + i (N/pi) (N/(2n + 1) - 1); real: -(n + 1).
    """
    if N < 2 or N % 2:
        raise ValueError(f"d_state={N} counts states in conjugate pairs: it must be even")
    if method == "legs":
        return diagonal_legs(N).eigenvalues
    n = torch.arange(N // 2, dtype=torch.float64)
    if method == "real":
        return torch.complex(-(n + 1), torch.zeros_like(n))
    if method == "lin":
        return torch.complex(torch.full_like(n, -0.5), math.pi * n)
    if method == "inv":
        return torch.complex(torch.full_like(n, -0.5), N / math.pi * (N / (2 * n + 1) - 1))
    raise ValueError(f"init_method={method!r}; expected legs, lin, inv or real")
