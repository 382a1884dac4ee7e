"""The position-wise part of a block: D -> d_ff -> GELU -> D."""

from torch import Tensor, nn
from torch.nn import functional as F

from lab.layers.feed_forward import FeedForward
from lab.mixers.base import Output
from lab.ops.program import Program, Value


class MLP(FeedForward):
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)

    def feed(self, x: Tensor, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        """x (..., D) -> (..., D)"""
        return Output(self.down(F.gelu(self.up(x))))

    def program(self, p: Program, x: Value) -> Value:
        return p.linear(self.down, p.apply("gelu", p.linear(self.up, x)))
