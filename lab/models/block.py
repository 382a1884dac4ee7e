"""A block of a stack: pre-norm branches around a residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from lab.layers import FeedForward
from lab.mixers import CrossAttention
from lab.mixers.base import Mixer, Output, State
from lab.ops.program import NotCompiled, Program, Value, part, without_dropout


class Block(nn.Module):
    """x + mixer(norm1(x)); in a decoder with a source x + cross(norm_cross(x)); where there is a feed-forward x + mlp(norm2(x)). Dropout on
    each branch. The convention of a mixer, with what `cross` holds of the source."""

    def __init__(
        self,
        d_model: int,
        mixer: Mixer,
        feed_forward: FeedForward | None,
        dropout: float,
        norm: Callable[[int], nn.Module],
        cross: CrossAttention | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm(d_model)
        self.mixer = mixer
        self.norm_cross = None if cross is None else norm(d_model)
        self.cross = cross
        self.norm2 = None if feed_forward is None else norm(d_model)
        self.mlp = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        state: State = None,
        *,
        lengths: Tensor | None = None,
        want: tuple[str, ...] = (),
        mask: Tensor | None = None,
        held: Tensor | Mapping[str, Tensor] | None = None,
        source_lengths: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor | Output:
        mixed = self.mixer(self.norm1(x), state, lengths=lengths, want=want, mask=mask)
        x = x + self.dropout(mixed.y if want else mixed)
        looked = fed = Output(x)
        if self.cross is not None and self.norm_cross is not None:
            looked = self.cross(self.norm_cross(x), held, lengths=source_lengths, mask=memory_mask, want=want)
            x = x + self.dropout(looked.y if want else looked)
        if self.mlp is not None and self.norm2 is not None:
            fed = self.mlp(self.norm2(x), lengths=lengths, want=want)
            x = x + self.dropout(fed.y if want else fed)
        if not want:
            return x
        return Output(x, mixed.state, {**mixed.losses, **fed.losses}, {**mixed.record, **looked.record, **fed.record}, fed.means)

    def program(self, p: Program, x: Value, state: State) -> None:
        """One token; x is changed in place."""
        without_dropout(self.dropout)
        if self.cross is not None:
            raise NotCompiled("cross-attention has no program")
        p.add(x, part(self.mixer).program(p, p.norm(self.norm1, x), state), onto=x)
        if self.mlp is not None and self.norm2 is not None:
            p.add(x, part(self.mlp).program(p, p.norm(self.norm2, x)), onto=x)
