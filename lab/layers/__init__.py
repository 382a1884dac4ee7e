"""Parts that several models share."""

from lab.layers.embedding import Embedding
from lab.layers.mlp import MLP

__all__ = ["MLP", "Embedding"]
