"""Parts that several models share."""

from lab.layers.embedding import Embedding
from lab.layers.mlp import MLP
from lab.layers.phase_mesh import PhaseMesh

__all__ = ["MLP", "Embedding", "PhaseMesh"]
