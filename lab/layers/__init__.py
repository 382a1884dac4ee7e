"""Parts that several models share."""

from lab.layers.embedding import Embedding
from lab.layers.feed_forward import FeedForward
from lab.layers.mlp import MLP
from lab.layers.moe import MoE
from lab.layers.phase_mesh import PhaseMesh
from lab.layers.rotary import Gate, Rotate, Sinusoidal, angles, rotated

__all__ = ["MLP", "Embedding", "FeedForward", "Gate", "MoE", "PhaseMesh", "Rotate", "Sinusoidal", "angles", "rotated"]
