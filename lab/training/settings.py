"""The trainer's settings: flat, and documented where a user reads them, in configs/trainer/default.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["32-true", "64-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class Settings:
    """Counts of steps are optimiser steps everywhere. Raises ValueError for values that contradict each other."""

    max_steps: int | None = None
    max_epochs: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    grad_clip: float | None = 1.0
    val_every: int = 500
    checkpoint_every: int = 500
    log_every: int = 50
    precision: Precision = "32-true"
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: int | Literal["auto"] = 1
    strategy: Literal["auto", "ddp"] = "auto"
    num_workers: int = 0
    deterministic: bool | Literal["warn"] = "warn"
    compile: bool = False
    activation_checkpointing: bool = False
    reuse_memory: bool = False
    log_layer_grad_norms: bool = False
    ema: float | None = None

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_epochs is None:
            raise ValueError("trainer needs max_steps or max_epochs; an experiment sets one, such as experiment=copy_reverse_small")
        if self.max_steps is not None and self.max_epochs is not None:
            raise ValueError("trainer needs only one of max_steps and max_epochs: set the other to null")
        for name in ("max_steps", "max_epochs", "batch_size", "accumulate", "val_every", "checkpoint_every", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"trainer.{name} must be at least 1, got {value}")
        if self.num_workers < 0:
            raise ValueError(f"trainer.num_workers must be 0 or more, got {self.num_workers}")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"trainer.grad_clip must be above 0, or null for no clipping, got {self.grad_clip}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"trainer.ema must be between 0 and 1, such as 0.999, or null, got {self.ema}")

    def steps(self, steps_per_epoch: int) -> int:
        """The length of training in optimiser steps."""
        return self.max_steps if self.max_steps is not None else self.max_epochs * steps_per_epoch  # type: ignore[operator]
