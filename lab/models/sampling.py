"""Choosing the next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None) -> Tensor:
    """logits (B, V) -> tokens (B,). temperature 0 is greedy; top_k > V means all of V."""
    if temperature == 0:
        return logits.argmax(-1)
    scores, token = logits.float() / temperature, None  # float32: a bfloat16 cumulative sum over a large vocabulary does not reach top_p
    if top_k is not None or top_p is not None:
        scores, token = scores.topk(scores.shape[1] if top_k is None else min(top_k, scores.shape[1]), dim=-1)  # the largest first
    if top_p is not None:
        p = torch.softmax(scores, -1)
        scores = scores.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)  # the probability before a token; the first always stays
    # The largest of log p - log E, E from Exp(1), has the law of p (Gumbel); multinomial does the same in three times the time.
    place = (scores - torch.empty_like(scores).exponential_(generator=generator).log_()).argmax(-1)
    return place if token is None else token.gather(1, place[:, None])[:, 0]


def check_sampling(
    prompt: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, lengths: Tensor | None
) -> None:
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"generate: the prompt has shape {tuple(prompt.shape)}; expected (batch, length) with at least one token")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens={max_new_tokens} must not be negative")
    if temperature < 0:
        raise ValueError(f"generate: temperature={temperature} must not be negative (0 is greedy)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p={top_p} must lie in (0, 1]")
    if lengths is not None:
        if lengths.shape != prompt.shape[:1]:
            raise ValueError(f"generate: lengths has shape {tuple(lengths.shape)}; expected ({len(prompt)},), one per row of the prompt")
        if bool((lengths < 1).any()) or bool((lengths > prompt.shape[1]).any()):
            raise ValueError(f"generate: lengths must lie in 1..{prompt.shape[1]}, the width of the prompt")
