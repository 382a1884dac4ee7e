"""Embedding tables drawn from N(0, 0.02^2), for tokens and for positions; and the look-up of tokens."""

from torch import Tensor, nn

from lab.ops.backend import recording


class Embedding(nn.Embedding):
    """`nn.Embedding` starts at N(0, 1), which drowns everything a pre-norm block adds to the residual stream."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


def looked_up(embedding: nn.Module, tokens: Tensor, d_model: int, owner: str) -> Tensor:
    """tokens (B, L) -> (B, L, D); with an Identity, of a model without a vocabulary, floats (B, L, D) as they are. ValueError otherwise."""
    if isinstance(embedding, nn.Embedding):
        try:
            return embedding(tokens)
        except IndexError:  # of the CPU; a GPU ends the process by itself
            low, high = int(tokens.min()), int(tokens.max())
            wrong, most = low if low < 0 else high, embedding.num_embeddings - 1
            raise ValueError(f"{owner}: token {wrong} is not in the vocabulary, 0..{most}") from None
    if not recording() and (tokens.ndim != 3 or not tokens.is_floating_point() or tokens.shape[-1] != d_model):
        raise ValueError(f"{owner} without vocab_size takes floats (B, L, {d_model}), got {tokens.dtype} {tuple(tokens.shape)}")
    return tokens
