"""A gated feed-forward layer: D -> SiLU(a) * b -> D.      arXiv:2002.05202"""

from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)"""
        a, b = self.up(x).chunk(2, -1)
        return self.down(F.silu(a) * b)
