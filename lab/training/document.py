"""metrics.json: one schema for every task, written by training and by lab-eval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lab import ops
from lab.models import SequenceModel
from lab.training.run import environment


def metrics_document(
    model: SequenceModel, identity: Mapping[str, Any], *, checkpoint: str, split: str, step: int, seed: int, metrics: Mapping[str, float],
    by_position: list[float | None], by_length: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """metrics.json: one schema for every task."""
    return {
        "task": identity["choices"]["task"],
        "model": identity["choices"]["model"],
        "checkpoint": checkpoint,
        "split": split,
        "step": step,
        "params": sum(p.numel() for p in model.parameters()),
        "metrics": dict(metrics),
        "by_length": dict(by_length or {}),
        "by_position": by_position,
        "config_hash": identity["config_hash"],
        "code_version": identity["code_version"],
        "git_commit": identity["git_commit"],
        "seed": seed,
        "backends": ops.used(),
        "env": environment(),
    }
