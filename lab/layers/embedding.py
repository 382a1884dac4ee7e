"""Embedding tables drawn from N(0, 0.02^2), for tokens and for positions; and the look-up of tokens."""

from typing import cast

import torch
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """`nn.Embedding` starts at N(0, 1), which drowns everything a pre-norm block adds to the residual stream."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


def check_tokens(embedding: nn.Module, tokens: Tensor, d_model: int, owner: str) -> None:
    """ValueError for what is no tokens (B, L), or with an Identity, of a model without a vocabulary, no floats (B, L, D)."""
    if isinstance(embedding, nn.Embedding):
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{owner}: tokens must be integers (B, L), got {tokens.dtype} {tuple(tokens.shape)}")
    elif tokens.ndim != 3 or not tokens.is_floating_point() or tokens.shape[-1] != d_model:
        raise ValueError(f"{owner} without vocab_size takes floats (B, L, {d_model}), got {tokens.dtype} {tuple(tokens.shape)}")


def looked_up(embedding: nn.Module, tokens: Tensor, owner: str) -> Tensor:
    """tokens (B, L) -> (B, L, D); with an Identity floats (B, L, D) as they are. ValueError for a token outside of the vocabulary."""
    try:
        return embedding(tokens)
    except IndexError:  # of the CPU; a GPU ends the process by itself
        low, high, most = int(tokens.min()), int(tokens.max()), cast(nn.Embedding, embedding).num_embeddings - 1
        raise ValueError(f"{owner}: token {low if low < 0 else high} is not in the vocabulary, 0..{most}") from None
