"""Beam search: of each prompt, the `beams` continuations with the best scores that a search of that width finds.

    score = log p(new tokens | prompt, source) / n^length_penalty        n new tokens, the stop token included

At each step every open continuation is extended by every token; the best `beams` of all these and of the closed ones, which end with the
stop token, go on. One beam is greedy decoding; as many as there are continuations are an exhaustive search. Any model with a state.

B = rows of the prompt, K = beams, N = new tokens, V = vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lab.models.base import SequenceModel


class Beams(NamedTuple):
    tokens: Tensor  # (B, K, N), the best first; pad_token behind a stop token
    scores: Tensor  # (B, K) in float32; -inf where there are fewer continuations than beams


@torch.no_grad()
def beam_search(
    model: SequenceModel,
    prompt: Tensor,
    max_new_tokens: int,
    beams: int,
    *,
    length_penalty: float = 0.0,
    stop_token: int | None = None,
    pad_token: int = 0,
    lengths: Tensor | None = None,
    source: Tensor | None = None,
    source_lengths: Tensor | None = None,
) -> Beams:
    """prompt (B, P), at least one new token; lengths, source and the rest as of `generate`. A length_penalty above 0 favours long
    continuations, 1 is the mean log p of a token. Stops when all kept continuations are closed. ValueError for what cannot be."""
    model.check_generation(prompt, max_new_tokens, 0.0, None, None, lengths, source)
    if max_new_tokens < 1:
        raise ValueError(f"beam_search: max_new_tokens={max_new_tokens} must be at least 1")
    if beams < 1:
        raise ValueError(f"beam_search: beams={beams} must be at least 1")
    B, K = len(prompt), beams
    out = model(prompt, lengths=lengths, source=source, source_lengths=source_lengths, want=("state", "last"))
    V, device = out.y.shape[-1], prompt.device
    first = torch.arange(B, device=device).repeat_interleave(K)
    state = model.reserve(model.map_state(lambda t: t.index_select(0, first), out.state), max_new_tokens - 1)
    log_p = out.y[first, 0].float().log_softmax(-1).view(B, K, V)
    total = torch.full((B, K), -torch.inf, device=device)  # log p of each continuation; at first there is one, the empty one
    total[:, 0] = 0.0
    n = torch.zeros(B, K, device=device)  # tokens of each
    closed = torch.zeros(B, K, dtype=torch.bool, device=device)
    tokens = prompt.new_zeros(B, K, 0)
    scores = total
    for i in range(max_new_tokens):
        # A closed continuation has one way on, itself; it stands in the column of token 0.
        ways = torch.where(closed[..., None], -torch.inf, total[..., None] + log_p)
        ways[..., 0] = torch.where(closed, total, ways[..., 0])
        size = torch.where(closed, n, n + 1)
        ranked = ways / size[..., None].clamp(min=1) ** length_penalty
        scores, chosen = ranked.flatten(1).topk(K, -1)
        parent, token = chosen // V, chosen % V
        total, was_closed, n = ways.flatten(1).gather(1, chosen), closed.gather(1, parent), size.gather(1, parent)
        token = torch.where(was_closed, pad_token, token)
        tokens = torch.cat([tokens.gather(1, parent[..., None].expand(-1, -1, i)), token[..., None]], -1)
        closed = was_closed | (token == stop_token) if stop_token is not None else was_closed
        if i + 1 == max_new_tokens or bool((closed | scores.isneginf()).all()):
            break
        rows = (parent + torch.arange(B, device=device)[:, None] * K).flatten()
        state = model.map_state(lambda t, rows=rows: t.index_select(0, rows), state)  # type: ignore[misc]
        fed = torch.where(was_closed, 0, token).view(B * K, 1)
        step = model(fed, state, want=("state", "in_place"))
        log_p, state = step.y[:, 0].float().log_softmax(-1).view(B, K, V), step.state
    return Beams(tokens, scores)
