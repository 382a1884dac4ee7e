"""Monitoring of experts: which of them the router chooses. The rules of lab/training/monitoring.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from lab.analysis.snapshots import write_snapshot
from lab.tasks import Task
from lab.training.loggers import log_figure
from lab.training.monitoring import Monitor, Record, layers_of, stacked


class Experts(Monitor):
    """Experts, of layers that record which ones each token goes to: MoE. RUN/experts/ holds a snapshot of each look
    (lab/analysis/snapshots.py).

    The usage of an expert is its share of the choices of all real tokens looked at, without capacity and noise, which only training has.
    To the loggers, per layer: usage_entropy, as a part of the most that it can be, log E (1: all alike, 0: one expert has all); max_share
    and min_share; dead_experts, those without a token. And a picture, layers by experts.
    """

    kind = "experts"
    needs = frozenset(("experts", "router"))

    def show(self, trainer: pl.Trainer, task: Task, record: Record) -> None:
        from lab.analysis.expert_plots import expert_usage

        step, real = trainer.global_step, self.real()
        chosen, router = (layers_of(record, name) for name in ("experts", "router"))
        probability = {i: p[real].mean(0) for i, p in router.items()}
        counts = {i: torch.bincount(chosen[i][real].long().flatten(), minlength=len(p)) for i, p in probability.items()}
        usage = {i: n / n.sum() for i, n in counts.items()}
        arrays: dict[str, Any] = {
            "tokens": np.int64(real.sum()),
            "usage": stacked(list(usage.values())),
            "probability": stacked(list(probability.values())),
            "layers": np.array(list(usage)),
        }
        write_snapshot(trainer.default_root_dir, self.kind, step, **arrays)
        scalars: dict[str, float] = {}
        for i, share in usage.items():
            most = np.log(max(len(share), 2))  # a single expert has entropy 0
            scalars |= {
                f"watch_experts/usage_entropy_layer_{i}": float(torch.special.entr(share).sum() / most),
                f"watch_experts/max_share_layer_{i}": float(share.max()),
                f"watch_experts/min_share_layer_{i}": float(share.min()),
                f"watch_experts/dead_experts_layer_{i}": float((share == 0).sum()),
            }
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step)
        log_figure(trainer.loggers, "watch_experts/usage", lambda: expert_usage(arrays | {"step": np.int64(step)}), step)
