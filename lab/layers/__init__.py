"""Parts that several models share."""

from lab.layers.embedding import Embedding
from lab.layers.mlp import MLP
from lab.layers.phase_mesh import PhaseMesh
from lab.layers.rotary import Gate, Rotate, angles, rotated

__all__ = ["MLP", "Embedding", "Gate", "PhaseMesh", "Rotate", "angles", "rotated"]
