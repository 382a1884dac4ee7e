"""Attention of a decoder to an encoded source.   y_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s, q of the decoder, k and v of the source

B = batch, L = length, S = tokens of the source, H = heads, d = D / H. Source: arXiv:1706.03762, section 3.2.3.
What is kept of a source: k (B, S, H, d), v (B, S, H, d), computed once by `hold`.
Record: cross_attention (B, H, L, S), the weights in float32 without their dropout.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lab.mixers.attention import attend, attention_weights
from lab.mixers.base import Output, check_at_least
from lab.mixers.masks import MaskConvention, check_convention, may_attend, never_empty, real


class CrossAttention(nn.Module):
    """d_source: the width of the source, None for d_model. dropout acts on the attention weights."""

    def __init__(
        self, d_model: int, n_heads: int, dropout: float = 0.0, d_source: int | None = None, mask_convention: MaskConvention | None = None
    ) -> None:
        super().__init__()
        check_at_least("CrossAttention", 1, d_model=d_model, n_heads=n_heads)
        if d_model % n_heads:
            raise ValueError(f"CrossAttention: d_model={d_model} must be a multiple of n_heads={n_heads}")
        check_convention("CrossAttention", mask_convention)
        self.n_heads, self.d_head, self.dropout, self.mask_convention = n_heads, d_model // n_heads, dropout, mask_convention
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.k = nn.Linear(d_source or d_model, d_model, bias=False)
        self.v = nn.Linear(d_source or d_model, d_model, bias=False)
        self.o = nn.Linear(d_model, d_model, bias=False)

    def hold(self, memory: Tensor) -> dict[str, Tensor]:
        """memory (B, S, d_source), the encoded source -> its keys and values (B, S, H, d)"""
        return {"k": self.k(memory).unflatten(-1, (self.n_heads, -1)), "v": self.v(memory).unflatten(-1, (self.n_heads, -1))}

    def forward(
        self,
        x: Tensor,
        memory: Tensor | Mapping[str, Tensor],
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        want: tuple[str, ...] = (),
    ) -> Tensor | Output:
        """x (B, L, D), memory (B, S, d_source) or what `hold` keeps of it, lengths (B,) its real tokens, mask (L, S), (B, L, S) or
        (B, H, L, S), True = may attend -> y (B, L, D), or an Output with `want`."""
        held = self.hold(memory) if isinstance(memory, Tensor) else memory
        q = self.q(x).unflatten(-1, (self.n_heads, self.d_head)) * self.d_head**-0.5
        k, v = held["k"].to(q.dtype), held["v"].to(q.dtype)
        S = k.shape[1]
        sees = None if lengths is None else real(lengths, S, x.device)[:, None, None]
        if mask is not None:
            given = may_attend("CrossAttention", mask, self.mask_convention, (*q.shape[:1], self.n_heads, q.shape[1], S))
            sees = given if sees is None else sees & given
        sees, empty = (None, None) if sees is None else never_empty(sees)
        y = self.o(attend(q, k, v, sees, self.dropout if self.training else 0.0, causal=False, empty=empty).flatten(-2))
        if not want:
            return y
        return Output(y, record={"cross_attention": attention_weights(q, k, sees, False, empty)} if "record" in want else {})
