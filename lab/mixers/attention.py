"""Causal softmax attention with an explicit key-value cache.   y_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(d)) v_s

B = batch, L = length of this chunk, S = slots of the cache, H = heads, d = D / H. Source: arXiv:1706.03762, section 3.2.
State: k (B, S, H, d), v (B, S, H, d), length (B,) tokens seen by each row; slots from `length` on are ignored.
Record: attention (B, H, L, S), the weights in float32 without their dropout, computed only where they are asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.mixers.base import Mixer, Output, State, check_at_least
from lab.ops.backend import without_autocast
from lab.ops.program import Program, Value


class Attention(Mixer):
    """dropout acts on the attention weights (above 0 it leaves the fused path on the CPU)."""

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_at_least("Attention", 1, d_model=d_model, n_heads=n_heads)
        if d_model % n_heads:
            raise ValueError(f"Attention: d_model={d_model} must be a multiple of n_heads={n_heads}")
        self.d_model, self.n_heads = d_model, n_heads
        self.d_head = d_model // n_heads
        self.dropout = dropout
        # No biases: one on k adds the same number to all scores of a query, which the softmax cancels.
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.k = nn.Linear(d_model, d_model, bias=False)
        self.v = nn.Linear(d_model, d_model, bias=False)
        self.o = nn.Linear(d_model, d_model, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D) -> q (scaled by 1/sqrt(d)), k, v, each (B, L, H, d)"""
        q, k, v = (f(x).unflatten(-1, (self.n_heads, self.d_head)) for f in (self.q, self.k, self.v))
        return q * self.d_head**-0.5, k, v

    def mix(self, x: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        y, state, record = cached_attention(*self.heads(x), state, lengths, want, self.dropout if self.training else 0.0)
        return Output(self.o(y.flatten(-2)), state, record=record)

    def init_state(self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        return empty_cache(batch_size, self.n_heads, self.d_head, self.d_head, self.q.weight, device, dtype)

    def reserve(self, state: State, n: int) -> State:
        return reserve_cache(state, n)

    def program(self, p: Program, x: Value, state: State) -> Value:
        q, k, v = (p.linear(layer, x) for layer in (self.q, self.k, self.v))
        return p.linear(self.o, p.attend(q, k, v, state["k"], state["v"], self.d_head**-0.5))


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...], dropout: float
) -> tuple[Tensor, dict[str, Tensor] | None, dict[str, Tensor]]:
    """Causal attention of a chunk to itself and to what `state` holds.

    q (B, L, H, e) already scaled, k (B, L, H, e), v (B, L, H, d) with e >= d -> y (B, L, H, d), and where `want` asks for them the new
    cache and the record.
    """
    if state is None:
        y = attend(q, k, v, None, dropout)  # right padding lies in the future of every real token: no mask needed
        record = {"attention": attention_weights(q, k, None)} if "record" in want else {}
        if "state" not in want:
            return y, None, record
        length = torch.full((k.shape[0],), k.shape[1], device=k.device) if lengths is None else lengths.to(k.device, torch.long)
        return y, {"k": k, "v": v, "length": length}, record

    length = state["length"]
    slot = length[:, None] + torch.arange(k.shape[1], device=k.device)  # (B, L): rows may have different lengths
    in_place = "in_place" in want
    keys = write(state["k"], k, slot, in_place)
    values = write(state["v"], v, slot, in_place)
    visible = torch.arange(keys.shape[1], device=k.device) <= slot[..., None]  # (B, L, S)
    y = attend(q, keys, values, visible[:, None], dropout)[..., : v.shape[-1]]
    record = {"attention": attention_weights(q, keys, visible[:, None])} if "record" in want else {}
    if "state" not in want:
        return y, None, record
    return y, {"k": keys, "v": values, "length": length + (k.shape[1] if lengths is None else lengths)}, record


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """q (B, L, H, e), k (B, S, H, e), v (B, S, H, d); mask (B, 1, L, S) with True = may attend, None = causal with L = S."""
    d = v.shape[-1]
    v = widen(v, q.shape[-1])  # unequal head sizes would leave the fused path and build the (L, S) matrix
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=1.0)
    return y.transpose(1, 2)[..., :d]


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """What `attend` weighs v with, as a matrix: q (B, L, H, e), k (B, S, H, e), mask as there -> (B, H, L, S) in float32, rows sum to 1."""
    with without_autocast(q):
        scores = torch.einsum("blhe,bshe->bhls", q.float(), k.float())
    if mask is None:
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(-1)


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
