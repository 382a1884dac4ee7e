"""How far back a model sees: by the formula of its convolutions, by the half-lives of its recurrences, and measured.

    convolutions   1 + sum of (K - 1) dilation over the layers, the tokens that can act on the last logit through them alone
    measured       |d logit / d embedding| of each token before the last one, for the most probable token behind random sequences

As numbers here, as a picture by `plot_receptive_field` (lab/analysis/plots.py).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from lab.mixers import Serriform
from lab.models import SequenceModel, evaluating

SMALL = 1e-3  # of the largest gradient: what is below counts as not seen
LONGEST = 2048  # tokens that are looked at, unless more are asked for


def by_convolution(model: nn.Module) -> int:
    """Tokens that the last logit sees through convolutions alone, itself included."""
    return 1 + sum(module.reach for module in model.modules() if isinstance(module, Serriform))


def half_lives(model: nn.Module) -> Tensor | None:
    """(layers with a recurrence, M) tokens, by layer; None where there is none."""
    found = [module.half_lives for module in model.modules() if isinstance(module, Serriform) and module.half_lives is not None]
    return torch.stack(found) if found else None


def measured(model: SequenceModel, length: int, rows: int = 4) -> np.ndarray:
    """(length,), by distance from the last token: the root mean square over random sequences of the gradient's norm."""
    if not isinstance(getattr(model, "embedding", None), nn.Embedding):
        raise ValueError(f"{type(model).__name__} has no table of embeddings to take a gradient of")
    table: nn.Embedding = model.embedding  # type: ignore[assignment]
    place = table.weight.device
    tokens = torch.randint(0, table.num_embeddings, (rows, length), generator=torch.Generator().manual_seed(0)).to(place)
    seen: list[Tensor] = []

    def watch(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        seen.append(out.detach().requires_grad_())
        return seen[-1]

    hook = table.register_forward_hook(watch)
    try:
        with evaluating(model), torch.enable_grad():
            logits = model(tokens, want=("last",)).y[:, 0]
            (gradient,) = torch.autograd.grad(logits.max(-1).values.sum(), seen[-1])
    finally:
        hook.remove()
    return gradient.float().square().sum(-1).mean(0).sqrt().flip(0).cpu().numpy()


def reach(gradient: np.ndarray) -> int:
    """Tokens up to the last one whose gradient is above SMALL of the largest."""
    above = np.flatnonzero(gradient > SMALL * gradient.max())
    return int(above[-1]) + 1 if len(above) else 0


def length_for(model: SequenceModel, longest: int = LONGEST) -> int:
    """Tokens that show both: twice what the convolutions see, four half-lives; at most `longest` and what the model takes."""
    lives = half_lives(model)
    most = 4 * float(lives.max()) if lives is not None else 0
    wanted = max(64, 2 * by_convolution(model), min(most, longest))
    return int(min(wanted, longest, model.max_len or math.inf))


def summary(model: SequenceModel) -> str | None:
    """One line about a model with Serriform layers, None about another."""
    if not any(isinstance(module, Serriform) for module in model.modules()) or not isinstance(model.embedding, nn.Embedding):
        return None
    if model.n_classes is not None:  # a pooled head sees the whole input
        return None
    said, lives = [], half_lives(model)
    if (tokens := by_convolution(model)) > 1:
        said.append(f"{tokens:,} tokens by convolution")
    if lives is not None:
        said.append(f"half-lives of {float(lives.min()):,.3g} to {float(lives.max()):,.4g} tokens by recurrence")
    length = length_for(model, 512)
    far = reach(measured(model, length, rows=1))
    formula = ", ".join(said) or "the last token alone"
    return f"{formula}; measured: {far:,} of {length:,} with a gradient above {SMALL:g} of the largest"
