"""Monitoring: what a model records (`want=("record",)`) on the first rows of the validation split, at step 0, every `interval` steps and
at the end.

It changes nothing: a pass of its own in eval mode, without gradients, uncompiled, with every random state put back; the first rank alone
does it. The weights are those being trained, not their average (`trainer.ema`). A model that does not record what a callback shows is
asked once and then left alone, without a word: LOT records phases and attention, the Transformer attention, others may record neither.
The pass holds the attention weights of all layers: 4 bytes x samples x heads x layers x length squared.

The names begin with watch_, so that TensorBoard, which sorts its groups, shows train and val first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from lab.analysis.conformance import evaluating
from lab.analysis.snapshots import snapshot_steps, write_snapshot
from lab.tasks import Batch
from lab.training.checkpoint import keep_random_states
from lab.training.loggers import log_figure, log_histograms

Record = Mapping[str, list[Tensor]]  # by name, a tensor for each layer


class Monitor(pl.Callback):
    """The common part: when to look, and how to look without a trace. interval: optimiser steps; null: never. samples: rows."""

    kind: Literal["phases", "attention"]
    needs: str  # the name in the record without which there is nothing to show

    def __init__(self, interval: int | None = 200, samples: int = 4) -> None:
        if interval is not None and interval < 1:
            raise ValueError(f"interval must be at least 1, or null for never, got {interval}")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.interval, self.samples = interval, samples
        self.batch: Batch | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.interval is None or not trainer.is_global_zero:
            return
        for step, file in snapshot_steps(trainer.default_root_dir, self.kind).items():
            if step > trainer.global_step:  # of a killed run, which now takes these steps again
                file.unlink()
        if trainer.global_step == 0:
            self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.interval is None or not trainer.is_global_zero:
            return
        if trainer.global_step % self.interval == 0 or trainer.global_step == trainer.max_steps:
            self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, module: Any) -> None:
        with keep_random_states():
            if self.batch is None:
                rows = module.task.split("val")
                self.batch = rows.batch(range(min(self.samples, len(rows)))).to(module.device)
            record = record_of(trainer, module.model, self.batch)
            if self.needs in record:
                self.show(trainer, module.task.prompt_len or 0, record)
            else:
                self.interval = None

    def show(self, trainer: pl.Trainer, prompt_len: int, record: Record) -> None:
        raise NotImplementedError

    def lengths(self) -> Tensor:
        """(B,) real tokens of each sample"""
        assert self.batch is not None
        B, L = self.batch.inputs.shape
        return torch.full((B,), L) if self.batch.lengths is None else self.batch.lengths.cpu()


def record_of(trainer: pl.Trainer, model: Any, batch: Batch) -> Record:
    """The record as float32 on the CPU."""
    with evaluating(model), trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
        record = model(batch.inputs, lengths=batch.lengths, want=("record",)).record
    return {name: [layer.detach().float().cpu() for layer in layers] for name, layers in record.items()}


class Phases(Monitor):
    """Phases of a lattice of oscillators: RUN/phases/ holds a snapshot of each look (lab/analysis/snapshots.py).

    To the loggers: sync_order per layer (mean r over real tokens), histograms of theta, omega and kappa, and the delimiter wave.
    """

    kind = "phases"
    needs = "theta"

    def show(self, trainer: pl.Trainer, prompt_len: int, record: Record) -> None:
        from lab.analysis.plots import delimiter_wave

        assert self.batch is not None
        step, loggers, lengths = trainer.global_step, trainer.loggers, self.lengths()
        real = torch.arange(self.batch.inputs.shape[1]) < lengths[:, None]  # (B, L)
        arrays = {
            "tokens": self.batch.inputs.cpu().numpy(),
            "lengths": lengths.numpy(),
            "prompt_len": np.int64(prompt_len),
            "theta": stacked(record["theta"]),
            "omega": stacked(record["omega"]),
            "kappa": stacked(record["kappa"]),
            "r": stacked(record["sync_order"]),
        }
        write_snapshot(trainer.default_root_dir, self.kind, step, **arrays)
        scalars = {f"watch_phases/sync_order_layer_{i}": float(r[real].mean()) for i, r in enumerate(record["sync_order"])}
        for logger in loggers:
            logger.log_metrics(scalars, step)
        names = ("theta", "omega", "kappa")
        log_histograms(loggers, {f"watch_phases/{name}_layer_{i}": x for name in names for i, x in enumerate(record[name])}, step)
        log_figure(loggers, "watch_phases/delimiter_wave", lambda: delimiter_wave(arrays | {"step": np.int64(step)}), step)


class Attention(Monitor):
    """Attention weights: the entropy of each head in nats (mean over real tokens; 0: one token gets all of the weight).

    To the loggers: that number, and a histogram of it over tokens. maps=True also stores the weights of the first sample in
    RUN/attention/ (lab/analysis/snapshots.py) and shows them as a picture.
    """

    kind = "attention"
    needs = "attention"

    def __init__(self, interval: int | None = 200, samples: int = 4, maps: bool = False) -> None:
        super().__init__(interval, samples)
        self.maps = maps

    def show(self, trainer: pl.Trainer, prompt_len: int, record: Record) -> None:
        assert self.batch is not None
        step, loggers, lengths = trainer.global_step, trainer.loggers, self.lengths()
        real = torch.arange(self.batch.inputs.shape[1]) < lengths[:, None]  # (B, L)
        entropies = [torch.special.entr(weights).sum(-1).movedim(1, -1)[real] for weights in record["attention"]]  # (tokens, H)
        scalars = {
            f"watch_attention/entropy_layer_{i}_head_{h}": value
            for i, entropy in enumerate(entropies)
            for h, value in enumerate(entropy.mean(0).tolist())
        }
        for logger in loggers:
            logger.log_metrics(scalars, step)
        log_histograms(loggers, {f"watch_attention/entropy_layer_{i}": entropy for i, entropy in enumerate(entropies)}, step)
        if self.maps:
            from lab.analysis.plots import attention_maps

            n = int(lengths[0])
            arrays = {
                "tokens": self.batch.inputs[0, :n].cpu().numpy(),
                "prompt_len": np.int64(prompt_len),
                "attention": stacked([weights[0, :, :n, :n] for weights in record["attention"]]).astype(np.float16),
            }
            write_snapshot(trainer.default_root_dir, self.kind, step, **arrays)
            log_figure(loggers, "watch_attention/maps", lambda: attention_maps(arrays | {"step": np.int64(step)}), step)


def stacked(layers: list[Tensor]) -> np.ndarray:
    return torch.stack(layers).numpy()
