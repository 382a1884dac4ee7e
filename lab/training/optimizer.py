"""AdamW, what it decays, and the schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class AdamW:
    """The optimiser node. `warmup_steps` of linear warm-up, then `schedule` down to `min_lr` (a fraction of lr) at the last step."""

    lr: float = 3e-4
    weight_decay: float = 0.01
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr must be above 0, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1), got {list(self.betas)}")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps must be 0 or more, got {self.warmup_steps}")
        if not 0 <= self.min_lr <= 1:
            raise ValueError(f"optimizer.min_lr is a fraction of lr from 0 to 1, got {self.min_lr}")

    def build(self, model: nn.Module, max_steps: int) -> tuple[torch.optim.AdamW, LambdaLR]:
        """The optimiser over all parameters of the model, and a scheduler to be stepped after each optimiser step."""
        groups = parameter_groups(model, self.lr, self.weight_decay)
        # On the CPU one fused kernel per tensor is faster. On a GPU it would unscale float16 gradients itself, after they were clipped.
        fused = True if all(p.device.type == "cpu" for p in model.parameters()) else None
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=fused)
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, max_steps))

    def factor(self, step: int, max_steps: int) -> float:
        """The learning rate at a step (0-based) as a fraction of lr: a pure function, so that a resume may change max_steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min((step - self.warmup_steps) / max(max_steps - self.warmup_steps, 1), 1.0)
        shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.schedule]
        return self.min_lr + (1 - self.min_lr) * shape


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of equal lr and decay. Norms, biases, embeddings and other vectors are not decayed; a parameter may bring its own
    values in an attribute `_optim`, such as {"lr": 1e-3, "weight_decay": 0.0}; its lr never exceeds the optimiser's."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        own = getattr(parameter, "_optim", {})
        decay = 0.0 if parameter.ndim < 2 or id(parameter) in embeddings else weight_decay
        key = (min(own.get("lr", lr), lr), own.get("weight_decay", decay))
        groups.setdefault(key, []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]
