"""Training: the LightningModule, its settings, runs and checkpoints.

The names are lazy: a config is checked against `Settings` and `AdamW` before Lightning is imported, which takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "AdamW": "optimizer",
    "Attention": "monitoring",
    "Csv": "loggers",
    "Experiment": "experiment",
    "Experts": "monitoring_experts",
    "Interrupted": "run",
    "Phases": "monitoring",
    "Progress": "callbacks",
    "Run": "run",
    "RunError": "run",
    "Settings": "settings",
    "StateSpaces": "monitoring",
    "TensorBoard": "loggers",
    "Wandb": "loggers",
    "evaluate_pretrained": "evaluate",
    "evaluate_run": "evaluate",
    "load": "load",
    "resume": "start",
    "train": "start",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(_HOME)
