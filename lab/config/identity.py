"""What makes two configs the same experiment: all of it but hardware, workers, logging and paths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lab.config.tree import dotted, leaves

IRRELEVANT = (
    "trainer.devices", "trainer.accelerator", "trainer.strategy", "trainer.num_workers", "trainer.reuse_memory",
    "trainer.log_every", "trainer.checkpoint_every", "trainer.log_layer_grad_norms", "logger", "run_dir", "resume", "fresh", "match",
    "task.reference", "task.eval_lengths",
)  # fmt: skip
"""Keys that do not make another experiment. What `match` has solved stands in the model's own key, which does."""
WATCHERS = ("lab.training.Progress", "lab.training.Phases", "lab.training.Attention", "lab.training.StateSpaces", "lab.training.Experts")
"""Callbacks that change nothing in what is trained."""


def config_hash(stored: Mapping[str, Any]) -> str:
    """8 hex digits that name the experiment. The order of keys does not matter, and 1.0 is 1."""
    values = {key: _canonical(value) for key, value in relevant(stored).items()}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """'optimizer.lr: 0.001 here, 0.0003 in the run', or None for the same experiment."""
    a, b = relevant(ours), relevant(theirs)
    for key in [*a, *(key for key in b if key not in a)]:
        if key not in a or key not in b or _canonical(a[key]) != _canonical(b[key]):
            return f"{key}: {_text(a, key)} here, {_text(b, key)} in the run"
    return None


def relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that make the experiment, by dotted key."""
    callbacks = config.get("callbacks") or {}
    kept = {name: node for name, node in callbacks.items() if node is not None and node.get("_target_") not in WATCHERS}
    values = {dotted(path): value for path, value in leaves({**config, "callbacks": kept})}
    ours = {key: value for key, value in values.items() if not any(f"{key}.".startswith(f"{name}.") for name in IRRELEVANT)}
    return {key: value for key, value in ours.items() if value != {}}  # callbacks without progress is callbacks without any


def _canonical(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_canonical, value))}]"
    if isinstance(value, dict):
        return json.dumps({str(key): _canonical(item) for key, item in value.items()}, sort_keys=True)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value)


def _text(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "not set"
