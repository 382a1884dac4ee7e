"""Monitoring: what a model records (`want=("record",)`) on the first rows of the validation split, at step 0, every `interval` steps and
at the end.

It changes nothing: a pass of its own in eval mode, without gradients, uncompiled, with every random state put back; the first rank alone
does it. The weights are those being trained, not their average (`trainer.ema`). A model that does not record what a callback shows is
asked once and then left alone, without a word: LOT records phases and attention, the Transformer attention, others may record neither.
Callbacks that look at the same rows in the same step share one pass. It holds the attention weights of all layers, 4 bytes x rows x heads x
layers x length squared; where that would be more than LIMIT, it looks at fewer rows, and then at fewer tokens, and says so.

The names begin with watch_, so that TensorBoard, which sorts its groups, shows train and val first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from lab.analysis.snapshots import snapshot_steps, write_snapshot
from lab.models import evaluating
from lab.tasks import Batch
from lab.training.checkpoint import keep_random_states
from lab.training.loggers import log_figure, log_histograms

Record = Mapping[str, list[Tensor]]  # by name, a tensor for each layer
LIMIT = 1 << 28  # bytes of attention weights in one pass
PROBE = 16  # tokens of the first pass, on one row, which shows what a model records


class Monitor(pl.Callback):
    """The common part: when to look, and how to look without a trace. interval: optimiser steps; null: never. samples: rows."""

    kind: Literal["phases", "attention"]
    needs: frozenset[str]  # the names in the record without which there is nothing to show

    def __init__(self, interval: int | None = 200, samples: int = 4) -> None:
        if interval is not None and interval < 1:
            raise ValueError(f"interval must be at least 1, or null for never, got {interval}")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.interval, self.samples = interval, samples
        self.batch: Batch | None = None  # what is looked at
        self.looked: int | None = None  # the step of the last look

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.interval is None or not trainer.is_global_zero:
            return
        for step, file in snapshot_steps(trainer.default_root_dir, self.kind).items():
            if step > trainer.global_step:  # of a killed run, which now takes these steps again
                file.unlink()
        if trainer.global_step == 0 and self.is_due(trainer):
            look(trainer, pl_module, self)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and self.is_due(trainer):
            look(trainer, pl_module, self)

    def is_due(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        return self.interval is not None and self.looked != step and (step % self.interval == 0 or step == trainer.max_steps)

    def show(self, trainer: pl.Trainer, prompt_len: int, record: Record) -> None:
        raise NotImplementedError

    def lengths(self) -> Tensor:
        """(B,) real tokens of each sample"""
        assert self.batch is not None
        B, L = self.batch.inputs.shape
        return torch.full((B,), L) if self.batch.lengths is None else self.batch.lengths.cpu()


def look(trainer: pl.Trainer, module: Any, first: Monitor) -> None:
    """One pass for `first` and for every other callback that is due and looks at the same rows."""
    due = [monitor for monitor in trainer.callbacks if isinstance(monitor, Monitor) and monitor.is_due(trainer)]  # type: ignore[attr-defined]
    due = [monitor for monitor in due if monitor.samples == first.samples]
    with keep_random_states():
        if first.batch is None:
            batch, names = rows_to_watch(trainer, module, first.samples)
            for monitor in due:
                monitor.batch = batch
                if not monitor.needs <= names:
                    monitor.interval = None
            due = [monitor for monitor in due if monitor.interval is not None]
        if not due:
            return
        assert first.batch is not None
        record = record_of(trainer, module.model, first.batch)
        for monitor in due:
            monitor.looked = trainer.global_step
            monitor.show(trainer, module.task.prompt_len or 0, record)


def rows_to_watch(trainer: pl.Trainer, module: Any, samples: int) -> tuple[Batch, frozenset[str]]:
    """The first rows of validation, as much of their inputs as LIMIT has room for; and the names of what the model records."""
    split = module.task.split("val")
    batch = split.batch(range(min(samples, len(split)))).to(module.device)
    B, L = batch.inputs.shape
    probe = record_of(trainer, module.model, batch._replace(inputs=batch.inputs[:1, :PROBE], lengths=None))
    of_a_row = sum(4 * weights.numel() for weights in probe.get("attention", [])) * (L / min(L, PROBE)) ** 2  # bytes
    if B * of_a_row > LIMIT:
        B = max(1, int(LIMIT / of_a_row))
        n = max(1, int(L * min(1, LIMIT / of_a_row) ** 0.5))
        print(
            f"monitoring looks at {B} of {len(batch.inputs)} rows, {n:,} of their {L:,} tokens: attention weights take memory", flush=True
        )
        lengths = None if batch.lengths is None else batch.lengths[:B].clamp(max=n)
        batch = batch._replace(inputs=batch.inputs[:B, :n], lengths=lengths)
    return batch, frozenset(probe)


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
    needs = frozenset(("theta", "omega", "kappa", "sync_order"))

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
    needs = frozenset(("attention",))

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
    """All layers as one array; where they differ in shape, the smaller ones are filled up with NaN."""
    shape = [max(sizes) for sizes in zip(*(layer.shape for layer in layers), strict=True)]
    out = np.full((len(layers), *shape), np.nan, np.float32)
    for whole, layer in zip(out, layers, strict=True):
        whole[tuple(map(slice, layer.shape))] = layer
    return out
