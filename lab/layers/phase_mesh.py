"""Phase Mesh Encoding: positions as the phases of coupled oscillators (LaminarNet), independent of the tokens.

    phi_0 = 0,   phi_{t+1} = wrap(phi_t + clip(omega + tanh(sum_q K_pq sin(phi_q - phi_p)), -pi, pi))
    embedding_t = W [cos phi_t; sin phi_t]

B = batch, L = length, P = oscillators, D = d_model. The recurrence is `lab.ops.kuramoto_scan`.
"""

import math

import torch
from torch import Tensor, nn

from lab.ops import kuramoto_scan


class PhaseMesh(nn.Module):
    """seq_len sets the slowest oscillator, one turn in so many tokens; it is no limit. The fastest one takes four tokens."""

    def __init__(self, d_model: int, n_oscillators: int = 16, seq_len: int = 2048) -> None:
        super().__init__()
        if n_oscillators < 1 or seq_len < 1:
            raise ValueError(f"PhaseMesh: n_oscillators={n_oscillators} and seq_len={seq_len} must be positive")
        self.seq_len = seq_len
        self.omega = nn.Parameter(torch.empty(n_oscillators))
        self.K = nn.Parameter(torch.empty(n_oscillators, n_oscillators))
        self.proj = nn.Linear(2 * n_oscillators, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        slowest, fastest = math.log(2 * math.pi / self.seq_len), math.log(2 * math.pi / 4)
        with torch.no_grad():
            self.omega.copy_(torch.linspace(slowest, fastest, len(self.omega)).exp())
        nn.init.normal_(self.K, std=1e-3)
        # Embeddings like those of tokens, of standard deviation 0.02: nn.Linear's own would be 20 times as large and drown them.
        nn.init.normal_(self.proj.weight, std=0.02 / math.sqrt(len(self.omega)))

    def forward(self, length: int, phi: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """phi (P,), or (B, P) where rows stand at different positions; None: the start of a sequence -> embedding (1 or B, L, D) and the
        phi that continues it, (1 or B, P): after token number lengths[b] (B,) of each row, or after number L."""
        phases, last = self.phases(length, phi, lengths)
        return self.waves(phases), last

    def phases(self, length: int, phi: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As forward, with the phases themselves (1 or B, L, P). They are float64: in float32 the same rounding error at every step adds up
        to 0.02 radians in 10^5 steps."""
        phi = self.initial_phase() if phi is None else phi
        rows = 1 if phi.ndim == 1 else phi.shape[0]
        still, one = self.omega.new_zeros(rows, length, *self.omega.shape), torch.ones_like(self.omega)
        return kuramoto_scan(phi.double(), still, self.omega, one, self.K, 1.0, lengths, form="mesh")

    def waves(self, phases: Tensor) -> Tensor:
        """phases (..., P) -> W [cos; sin] (..., D)"""
        phases = phases.to(torch.promote_types(self.proj.weight.dtype, torch.float32))
        return self.proj(torch.cat([phases.cos(), phases.sin()], -1).to(self.proj.weight.dtype))

    def initial_phase(self) -> Tensor:
        """phi_0 (P,)"""
        return torch.zeros_like(self.omega, dtype=torch.float64)
