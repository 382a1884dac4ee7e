"""What a state space does, from its eigenvalues A and its time steps dt, as numpy arrays.

A state obeys x' = A x + B u with real or complex A, sampled with step dt: a token multiplies it by e^{dt A}, so that it has decayed to 1/e
after -1 / (dt Re A) tokens, its memory. c = channels, n = states, N = those of Mamba, L = length.
"""

from __future__ import annotations

import numpy as np

DT_EDGES = np.linspace(-6, 2, 81)
"""log10 of dt, the bins of a stored histogram; what lies outside is counted at the ends."""


def memory(eigenvalues: np.ndarray, dt: np.ndarray) -> np.ndarray:
    """eigenvalues (c, n, 2), dt (c, 1) or (1, n) -> (c, n) tokens until a state has decayed to 1/e; infinite where it does not decay."""
    with np.errstate(divide="ignore"):
        return 1 / np.maximum(-eigenvalues[..., 0] * dt, 0)


def discrete(eigenvalues: np.ndarray, dt: np.ndarray) -> np.ndarray:
    """eigenvalues (c, n, 2), dt (c, 1) or (1, n) -> e^{dt A} (c, n), complex: what one token makes of a state."""
    return np.exp(dt * (eigenvalues[..., 0] + 1j * eigenvalues[..., 1]))


def decay(eigenvalues: np.ndarray, dt: np.ndarray) -> np.ndarray:
    """Real eigenvalues (c, N, 2), dt (L, c) of each token -> (L, c), the mean of e^{dt A} over the N states: how much of them stays."""
    return np.exp(dt[..., None] * eigenvalues[..., 0]).mean(-1)


def selective_responses(eigenvalues: np.ndarray, dt: np.ndarray, B: np.ndarray, C: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Eigenvalues (c, N, 2), dt (L, c), B, C (L, N) of a sequence, at (S,) tokens -> (L, S, c): what a unit impulse into a channel's state
    space at token s gives at token t, with dt, B and C as they are:  C_t . e^{(dt_{s+1} + ... + dt_t) A} dt_s B_s, 0 before s.

    The state space alone, without the convolution, the skip D and the gate. Its mean over channels is Mamba's hidden attention,
    arXiv:2403.01590.
    """
    A = eigenvalues[..., 0]
    h = np.zeros((len(at), *A.shape), np.float32)
    out = np.zeros((len(dt), *h.shape[:2]), np.float32)
    for t in range(len(dt)):
        h *= np.exp(dt[t, :, None] * A)
        h[at == t] = dt[t, :, None] * B[t]
        out[t] = h @ C[t]
    return out


def two_sided(kernel: np.ndarray) -> np.ndarray:
    """kernel (1, c, L) -> (c, L); (2, c, L), the second of which looks ahead -> (c, 2 L - 1), lag 0 in the middle, where both act."""
    if len(kernel) == 1:
        return kernel[0]
    return np.concatenate([kernel[1, :, :0:-1], kernel[0, :, :1] + kernel[1, :, :1], kernel[0, :, 1:]], 1)
