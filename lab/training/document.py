"""metrics.json: one schema for every task, written by training and by lab-eval."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from lab import ops
from lab.analysis.cost import cost, params
from lab.memory import allocator
from lab.models import SequenceModel
from lab.training.provenance import environment

log = logging.getLogger(__name__)


def metrics_document(
    model: SequenceModel, identity: Mapping[str, Any], *, seq_len: int, checkpoint: str, split: str, step: int | None, seed: int | None,
    metrics: Mapping[str, float],
    tables: Mapping[str, Any], references: Mapping[str, float], published: Mapping[str, Any], data: Mapping[str, Any],
    by_length: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """seq_len: of the task; the cost is counted for it. tables: by_position, and what else `Evaluation` gives. references: scores of the
    whole split that need no model, in units of the task's first metric; published: those of others, {name: {value, source}}. data: what
    identifies the data, and how much of the split was scored in which way. step, seed: None of weights that came without them."""
    return {
        "task": identity["choices"]["task"],
        "model": identity["choices"]["model"],
        "checkpoint": checkpoint,
        "split": split,
        "step": step,
        "params": params(model),
        "cost": _cost(model, seq_len),
        "metrics": dict(metrics),
        "references": dict(references),
        "published": dict(published),
        "data": dict(data),
        "by_length": dict(by_length or {}),
        **tables,
        "config_hash": identity["config_hash"],
        "code_version": identity["code_version"],
        "git_commit": identity["git_commit"],
        "seed": seed,
        "backends": ops.used(),
        "env": environment() | {"threads": str(torch.get_num_threads()), "allocator": allocator()},
    }


def _cost(model: SequenceModel, seq_len: int) -> dict[str, Any] | None:
    """None, and a line that says why, of a model that cannot be counted: the scores of a run are not lost for it."""
    try:
        return cost(model, seq_len)
    except Exception as error:  # whatever a layer of the user's own raises on tensors without numbers
        log.warning("the cost of this model is not in metrics.json: %s: %s", type(error).__name__, str(error).partition("\n")[0])
        return None
