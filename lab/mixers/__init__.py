"""Mixers: (B, L, D) -> (B, L, D) over time. One file each; each can be used alone, as `y = Attention(64, n_heads=4)(x)`."""

from lab.mixers.attention import Attention
from lab.mixers.base import Mixer, Output, State
from lab.mixers.lattice import Lattice

__all__ = ["Attention", "Lattice", "Mixer", "Output", "State"]
