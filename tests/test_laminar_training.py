"""LaminarNet trains when it is deep: no NaN, and no layer whose gradient vanishes or explodes."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lab.models import Laminar, initialise

LAYERS, STEPS = 24, 12


def layer_norms(model: Laminar) -> torch.Tensor:
    """(n_layers,) the norm of the gradient of each block."""
    return torch.stack([torch.stack([p.grad.norm() for p in block.parameters()]).norm() for block in model.blocks])


def test_24_layers_train_and_their_gradients_stay_within_a_factor_of_100():
    model = Laminar(11, 16, n_heads=2, n_layers=LAYERS, n_strata=3, seq_len=32, dropout=0.0)
    initialise(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    g, losses, spreads = torch.Generator().manual_seed(0), [], []
    for _ in range(STEPS):
        tokens = torch.randint(0, 2, (4, 33), generator=g)  # two of eleven
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms = layer_norms(model)
        assert loss.isfinite() and norms.isfinite().all()
        losses.append(loss.item())
        spreads.append((norms.max() / norms.min()).item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert max(spreads) < 100, spreads
    assert losses[-1] < 0.8 * losses[0]
