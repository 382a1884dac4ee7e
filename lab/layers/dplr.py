"""A state space whose matrix is diagonal plus low rank, sampled by the bilinear rule.      arXiv:2111.00396

    x' = A x + B u,  A = diag(Lambda) - sum_j P_j P_j*;   A' = (I - dt/2 A)^-1 (I + dt/2 A),  B' = (I - dt/2 A)^-1 dt B
    h_t = A' h_{t-1} + B' u_t,  y_t = 2 Re(C . h_t)

D = channels, n = one of each pair of conjugates, r = rank; complex numbers as pairs (..., 2). With Re Lambda < 0 no power of A' grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lab.ops import cauchy_kernel, dplr_scan
from lab.ops.complex import conjugate, divide, dot, multiply


class Dplr:
    """Lambda, B (D, n, 2), P (r, D, n, 2), dt (D, 1).

    All of it is computed in float64, and what a caller gives and gets has his dtype: a long time step puts eigenvalues of A' next to -1,
    where float32 cannot tell a state that stays from one that decays.

    A' h = h + d h - sum_j right_j dot(left_j, h): the inverse in it is that of a diagonal, corrected for one P after the other (Sherman
    and Morrison).
    """

    def __init__(self, Lambda: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> None:
        Lambda, P, B, half = Lambda.double(), P.double(), B.double(), dt.double()[..., None] / 2
        self.w, self.P, self.B = half * Lambda, half.sqrt() * P, half * B
        one = self.w.new_tensor([1.0, 0.0])
        inverse = divide(one, one - self.w)
        corrections: list[tuple[Tensor, Tensor]] = []  # x -> inverse x - sum of right dot(left, x)
        for p in self.P.unbind():
            right, left = multiply(inverse, p), multiply(inverse, conjugate(p))
            for column, row in corrections:
                right, left = right - column * dot(row, p), left - row * dot(column, conjugate(p))
            corrections.append((right / (1 + dot(left, p)), left))
        b = multiply(inverse, self.B)
        for column, row in corrections:
            b = b - column * dot(row, self.B)
        self.d, self.b = 2 * multiply(self.w, inverse), 2 * b  # A' = 2 (I - dt/2 A)^-1 - I
        rights, lefts = zip(*corrections, strict=True)
        self.right, self.left = 2 * torch.stack(rights), torch.stack(lefts)

    def scan(self, u: Tensor, h0: Tensor | None, C: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """As a recurrence: u (B, L, D), the state before it, C (D, n, 2) -> y (B, L, D), the state (B, D, n, 2) after the last real
        token."""
        y, last = dplr_scan(u, h0, self.d, self.right, self.left, self.b, C, lengths)
        return y.to(u.dtype), last.to(u.dtype)

    def kernels(self, C: Tensor, length: int) -> Tensor:
        """C (k, D, n, 2) -> 2 Re(C A'^l B') (k, D, length).

        What generates the first L terms is what generates all, at the roots of unity and with C (I - A'^L) in place of C.
        """
        if not length:
            return C.new_zeros(*C.shape[:2], 0)
        k, r = len(C), len(self.P)
        rows = torch.cat([self.cut(C.double(), length), conjugate(self.P)]).transpose(0, 1)
        columns = torch.cat([self.B[None], self.P]).transpose(0, 1)
        v = multiply(rows[:, :, None], columns[:, None]).flatten(1, 2)  # (D, (k + r) (1 + r), n, 2)
        sums = torch.view_as_complex(cauchy_kernel(self.w, v, length)).unbind(1)
        angle = torch.pi / length * torch.arange(length // 2 + 1, device=C.device, dtype=torch.float64)
        turn = torch.polar(torch.ones_like(angle), angle)
        Q = [list(sums[i * (1 + r) : (i + 1) * (1 + r)]) for i in range(k + r)]
        for p in reversed(range(r)):  # Woodbury's identity, one P after the other
            pivot = turn.real / (1 + turn.real * Q[k + p][1 + p])
            for i in range(k + p):
                factor = Q[i][1 + p] * pivot
                Q[i] = [Q[i][j] - factor * Q[k + p][j] for j in range(1 + p)]
        return torch.fft.irfft(turn * torch.stack([Q[i][0] for i in range(k)]), length).to(C.dtype)

    def cut(self, C: Tensor, length: int) -> Tensor:
        """C (I - A'^L) (k, D, n, 2), the recurrence from the other side: the rows x_l = C (A'^l - I) obey x_{l+1} = x_l A' + C (A' - I)."""
        ones = C.new_ones(1, length, C.shape[1])
        rows = []
        for c in C.unbind():
            first = multiply(self.d, c)
            for right, left in zip(self.right, self.left, strict=True):
                first = first - left * dot(right, c)
            rows.append(-dplr_scan(ones, None, self.d, self.left, self.right, first, c)[1][0])
        return torch.stack(rows)
