"""Mixers: (B, L, D) -> (B, L, D) over time. One file each; each can be used alone, as `y = Attention(64, n_heads=4)(x)`."""

from lab.mixers.attention import Attention
from lab.mixers.base import Mixer, Output, State
from lab.mixers.cross_attention import CrossAttention
from lab.mixers.drift import GeometricDriftField
from lab.mixers.gated_mlp import GatedMLP
from lab.mixers.h3 import H3Layer
from lab.mixers.lattice import Lattice
from lab.mixers.mamba import MambaLayer
from lab.mixers.s4 import S4Layer
from lab.mixers.s4d import S4DLayer
from lab.mixers.s5 import S5Layer
from lab.mixers.serriform import Serriform

__all__ = [
    "Attention", "CrossAttention", "GatedMLP", "GeometricDriftField", "H3Layer", "Lattice", "MambaLayer", "Mixer", "Output", "S4DLayer",
    "S4Layer", "S5Layer", "Serriform", "State",
]  # fmt: skip
