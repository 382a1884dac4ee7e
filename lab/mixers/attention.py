"""Softmax attention with an explicit key-value cache.   y_t = sum_s softmax_s(q_t . k_s / sqrt(d) + b(t, s)) v_s

    which s       causal: s <= t. bidirectional: all. window W: of these, those with |t - s| < W
    position      none     b = 0
                  rope     q and k turned by the angles of their places (lab/layers/rotary.py); b = 0             arXiv:2104.09864
                  alibi    b = -m_h |t - s|, with the slopes m_h of head h, 2^(-8 h / H) for h = 1 .. H           arXiv:2108.12409

B = batch, L = length of this chunk, S = slots of the cache, H = heads, d = D / H. Source: arXiv:1706.03762, section 3.2.
State: k (B, S, H, d), v (B, S, H, d), length (B,) tokens seen by each row; slots from `length` on are ignored. Not of bidirectional
attention, which has none. A window hides what is older, but the cache keeps it.
Record: attention (B, H, L, S), the weights in float32 without their dropout, computed only where they are asked for.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.layers.rotary import rotated
from lab.mixers.base import Mixer, Output, State, check_at_least
from lab.mixers.masks import MaskConvention, Pattern, check_convention, may_attend, slopes
from lab.ops.backend import without_autocast
from lab.ops.program import NotCompiled, Program, Value


class Attention(Mixer):
    """dropout acts on the attention weights (above 0 it leaves the fused path on the CPU, as alibi and window do). mask_convention: what
    a mask of numbers means, which is an error without one (lab/mixers/masks.py)."""

    takes_mask = True

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        dropout: float = 0.0,
        position: Literal["none", "rope", "alibi"] = "none",
        window: int | None = None,
        bidirectional: bool = False,
        mask_convention: MaskConvention | None = None,
    ) -> None:
        super().__init__()
        check_at_least("Attention", 1, d_model=d_model, n_heads=n_heads, **({} if window is None else {"window": window}))
        if d_model % n_heads:
            raise ValueError(f"Attention: d_model={d_model} must be a multiple of n_heads={n_heads}")
        if position not in ("none", "rope", "alibi"):
            raise ValueError(f"Attention: position={position!r}; expected none, rope or alibi")
        if position == "rope" and d_model // n_heads % 2:
            raise ValueError(f"Attention: position=rope turns pairs of channels: the {d_model // n_heads} of each head must be even")
        check_convention("Attention", mask_convention)
        self.d_model, self.n_heads = d_model, n_heads
        self.d_head = d_model // n_heads
        self.dropout = dropout
        self.position, self.window, self.mask_convention = position, window, mask_convention
        if bidirectional:
            self.causal = False
        # No biases: one on k adds the same number to all scores of a query, which the softmax cancels.
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.k = nn.Linear(d_model, d_model, bias=False)
        self.v = nn.Linear(d_model, d_model, bias=False)
        self.o = nn.Linear(d_model, d_model, bias=False)
        self.register_buffer("slopes", slopes(n_heads) if position == "alibi" else None, persistent=False)

    slopes: Tensor | None

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D) -> q (scaled by 1/sqrt(d)), k, v, each (B, L, H, d)"""
        q, k, v = (f(x).unflatten(-1, (self.n_heads, self.d_head)) for f in (self.q, self.k, self.v))
        return q * self.d_head**-0.5, k, v

    def pattern(self, x: Tensor, state: State, mask: Tensor | None) -> Pattern:
        """mask (L, L), (B, L, L) or (B, H, L, L), True = may attend: a limit beside those of the layer; not with a state."""
        (B, L), given, owner = x.shape[:2], None, type(self).__name__
        if mask is not None:
            if state is not None:
                raise ValueError(f"{owner}: a mask is of a sequence from its beginning; it cannot be given with a state")
            given = may_attend(owner, mask, self.mask_convention, (B, self.n_heads, L, L))
        return Pattern(not self.causal, self.window, self.slopes, given)

    def mix(self, x: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...], mask: Tensor | None = None) -> Output:
        pattern = self.pattern(x, state, mask)
        q, k, v = self.heads(x)
        if self.position == "rope":
            places = torch.arange(x.shape[1], device=x.device) + (0 if state is None else state["length"][:, None])
            q, k = rotated(q, places), rotated(k, places)
        y, state, record = cached_attention(q, k, v, state, lengths, want, self.dropout if self.training else 0.0, pattern)
        return Output(self.o(y.flatten(-2)), state, record=record)

    def init_state(self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        self.check_causal()
        return empty_cache(batch_size, self.n_heads, self.d_head, self.d_head, self.q.weight, device, dtype)

    def reserve(self, state: State, n: int) -> State:
        return reserve_cache(state, n)

    def program(self, p: Program, x: Value, state: State) -> Value:
        if self.position != "none" or self.window is not None:
            raise NotCompiled("Attention with position rope or alibi, or with a window, has no program")
        q, k, v = (p.linear(layer, x) for layer in (self.q, self.k, self.v))
        return p.linear(self.o, p.attend(q, k, v, state["k"], state["v"], self.d_head**-0.5))


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    lengths: Tensor | None,
    want: tuple[str, ...],
    dropout: float,
    pattern: Pattern = Pattern(),  # noqa: B008 (immutable)
) -> tuple[Tensor, dict[str, Tensor] | None, dict[str, Tensor]]:
    """Attention of a chunk to itself and to what `state` holds.

    q (B, L, H, e) already scaled, k (B, L, H, e), v (B, L, H, d) with e >= d -> y (B, L, H, d), and where `want` asks for them the new
    cache and the record.
    """
    if state is None:
        L = k.shape[1]  # of causal attention, right padding lies in the future of every real token: no mask needed
        mask, empty = (None, None) if pattern.is_plain(lengths) else pattern.mask(torch.arange(L, device=k.device)[None], L, lengths)
        y = attend(q, k, v, mask, dropout, causal=not pattern.bidirectional, empty=empty)
        record = {"attention": attention_weights(q, k, mask, not pattern.bidirectional, empty)} if "record" in want else {}
        if "state" not in want:
            return y, None, record
        length = torch.full((k.shape[0],), L, device=k.device) if lengths is None else lengths.to(k.device, torch.long)
        return y, {"k": k, "v": v, "length": length}, record

    length = state["length"]
    slot = length[:, None] + torch.arange(k.shape[1], device=k.device)  # (B, L): rows may have different lengths
    in_place = "in_place" in want
    keys = write(state["k"], k, slot, in_place)
    values = write(state["v"], v, slot, in_place)
    mask, _ = pattern.mask(slot, keys.shape[1], None)
    y = attend(q, keys, values, mask, dropout)[..., : v.shape[-1]]
    record = {"attention": attention_weights(q, keys, mask)} if "record" in want else {}
    if "state" not in want:
        return y, None, record
    return y, {"k": keys, "v": values, "length": length + (k.shape[1] if lengths is None else lengths)}, record


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool = True, empty: Tensor | None = None
) -> Tensor:
    """q (B, L, H, e), k (B, S, H, e), v (B, S, H, d) -> y (B, L, H, d). mask (B or 1, H or 1, L, S), True = may attend, or what is added
    to the scores; None = causal with L = S, or all. empty (B or 1, H or 1, L, 1): queries that may attend to nothing, which get zeros."""
    d = v.shape[-1]
    v = widen(v, q.shape[-1])  # unequal head sizes would leave the fused path and build the (L, S) matrix
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal and mask is None, scale=1.0)
    if empty is not None:
        y = y.masked_fill(empty, 0.0)
    return y.transpose(1, 2)[..., :d]


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool = True, empty: Tensor | None = None) -> Tensor:
    """What `attend` weighs v with, as a matrix: q (B, L, H, e), k (B, S, H, e), the rest as there -> (B, H, L, S) in float32, whose rows
    sum to 1, or to 0 where they are empty."""
    with without_autocast(q):
        scores = torch.einsum("blhe,bshe->bhls", q.float(), k.float())
    if mask is None and causal:
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1)
    return weights if empty is None else weights.masked_fill(empty, 0.0)


def widen(x: Tensor, d: int) -> Tensor:
    """x (..., e) -> (..., d) with zero columns added"""
    return x if x.shape[-1] == d else F.pad(x, (0, d - x.shape[-1]))


def write(cache: Tensor, new: Tensor, slot: Tensor, in_place: bool) -> Tensor:
    """Puts new (B, L, H, d) into the slots (B, L) of cache (B, S, H, e): of the cache itself, or of a copy with room for L more."""
    if not in_place:
        cache = F.pad(cache, (0, 0, 0, 0, 0, new.shape[1]))
    new = widen(new, cache.shape[-1]).to(cache.dtype)
    return cache.scatter_(1, slot[..., None, None].expand_as(new), new)


def empty_cache(
    batch_size: int, n_heads: int, d_key: int, d_value: int, like: Tensor, device: torch.device | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    options: dict[str, Any] = {"device": device or like.device, "dtype": dtype or like.dtype}
    return {
        "k": torch.zeros(batch_size, 0, n_heads, d_key, **options),
        "v": torch.zeros(batch_size, 0, n_heads, d_value, **options),
        "length": torch.zeros(batch_size, dtype=torch.long, device=options["device"]),
    }


def reserve_cache(state: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """n more slots, and v as wide as k, so that no step has to widen all of it. Zeros: a masked NaN in v would still reach the output."""
    v = widen(state["v"], state["k"].shape[-1])
    return state | {"k": F.pad(state["k"], (0, 0, 0, 0, 0, n)), "v": F.pad(v, (0, 0, 0, 0, 0, n))}
