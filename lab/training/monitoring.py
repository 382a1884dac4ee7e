"""Monitoring: what a model records (`want=("record",)`) on the first rows of the validation split, at step 0, every `interval` steps and
at the end.

It changes nothing: a pass of its own in eval mode, without gradients, uncompiled, with every random state put back; the first rank alone
does it. The weights are those being trained, not their average (`trainer.ema`). A model that does not record what a callback shows is
asked once and then left alone, without a word: LOT records phases and attention, the Transformer attention, S4, S4D, S5 and Mamba state
spaces, a mixture of experts what the router chooses (lab/training/monitoring_experts.py).
Callbacks that look at the same rows in the same step share one pass. It holds what all layers record, attention weights 4 bytes x rows x
heads x layers x length squared; where that would be more than LIMIT, it looks at fewer rows, and then at fewer tokens, and says so.

The names begin with watch_, so that TensorBoard, which sorts its groups, shows train and val first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from lab.analysis.snapshots import snapshot_steps, write_snapshot
from lab.models import evaluating
from lab.tasks import Batch, Task
from lab.training.checkpoint import keep_random_states
from lab.training.loggers import log_figure, log_histograms

Record = Mapping[str, list[Tensor | None]]  # by name, a tensor for each layer, None where the layer does not record it
LIMIT = 1 << 28  # bytes of one pass's record, of what grows with the length
PROBE = 16  # tokens of the first pass, on one row, which shows what a model records
MAPS = ("attention", "cross_attention", "encoder_attention")  # attention weights in a record
CHANNELS = 16  # of each state space in a snapshot, evenly spaced in the order of their dt
TOKENS = 512  # of the first row in a snapshot of state spaces; as many lags of a kernel


class Monitor(pl.Callback, ABC):
    """The common part: when to look, and how to look without a trace. interval: optimiser steps; null: never. samples: rows."""

    kind: Literal["phases", "attention", "state_spaces", "experts"]
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

    def sees(self, names: frozenset[str]) -> bool:
        """Whether a record of these names has what there is to show."""
        return self.needs <= names

    def is_due(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        return self.interval is not None and self.looked != step and (step % self.interval == 0 or step == trainer.max_steps)

    @abstractmethod
    def show(self, trainer: pl.Trainer, task: Task, record: Record) -> None:
        """Draws and stores what the record has."""

    def lengths(self) -> Tensor:
        """(B,) real tokens of each sample"""
        assert self.batch is not None
        B, L = self.batch.inputs.shape
        return torch.full((B,), L) if self.batch.lengths is None else self.batch.lengths.cpu()

    def real(self) -> Tensor:
        """(B, L) where a token is no padding"""
        assert self.batch is not None
        return torch.arange(self.batch.inputs.shape[1]) < self.lengths()[:, None]

    def source_lengths(self) -> Tensor:
        """(B,) real tokens of each sample's source"""
        assert self.batch is not None and self.batch.source is not None
        B, S = self.batch.source.shape
        return torch.full((B,), S) if self.batch.source_lengths is None else self.batch.source_lengths.cpu()


def look(trainer: pl.Trainer, module: Any, first: Monitor) -> None:
    """One pass for `first` and for every other callback that is due and looks at the same rows."""
    due = [monitor for monitor in trainer.callbacks if isinstance(monitor, Monitor) and monitor.is_due(trainer)]  # type: ignore[attr-defined]
    due = [monitor for monitor in due if monitor.samples == first.samples]
    with keep_random_states():
        if first.batch is None:
            batch, names = rows_to_watch(trainer, module, first.samples)
            for monitor in due:
                monitor.batch = batch
                if not monitor.sees(names):
                    monitor.interval = None
            due = [monitor for monitor in due if monitor.interval is not None]
        if not due:
            return
        assert first.batch is not None
        record = record_of(trainer, module.model, first.batch)
        for monitor in due:
            monitor.looked = trainer.global_step
            monitor.show(trainer, module.task, record)


def rows_to_watch(trainer: pl.Trainer, module: Any, samples: int) -> tuple[Batch, frozenset[str]]:
    """The first rows of validation, as much of their inputs as LIMIT has room for; and the names of what the model records."""
    split = module.task.split("val")
    batch = split.batch(range(min(samples, len(split)))).to(module.device)
    B, L = batch.inputs.shape
    longest = max(L, 0 if batch.source is None else batch.source.shape[1])
    probe = record_of(trainer, module.model, cut(batch, 1, PROBE)._replace(lengths=None, source_lengths=None))
    longer = longest / min(longest, PROBE)
    pairs = longer**2 * bytes_of(probe, *MAPS)  # of a row
    each = longer * bytes_of(probe, "dt", "kernel")
    if B * (pairs + each) > LIMIT:
        B = max(1, int(LIMIT / (pairs + each)))
        share = 2 * LIMIT / (each + (each**2 + 4 * pairs * LIMIT) ** 0.5)  # pairs share^2 + each share = LIMIT
        n = max(1, int(longest * min(1, share)))
        seen = f"{min(n, L):,} of their {L:,} tokens"
        print(f"monitoring looks at {B} of {len(batch.inputs)} rows, {seen}: what it sees takes memory", flush=True)
        batch = cut(batch, B, n)
    return batch, frozenset(probe)


def cut(batch: Batch, rows: int, n: int) -> Batch:
    """The first rows, and n tokens of their inputs and of their source."""

    def lengths(of: Tensor | None) -> Tensor | None:
        return None if of is None else of[:rows].clamp(max=n)

    source = None if batch.source is None else batch.source[:rows, :n]
    return Batch(batch.inputs[:rows, :n], batch.targets[:rows], lengths(batch.lengths), source, lengths(batch.source_lengths))


def bytes_of(record: Record, *names: str) -> int:
    return sum(4 * layer.numel() for name in names for layer in record.get(name, []) if layer is not None)


def record_of(trainer: pl.Trainer, model: Any, batch: Batch) -> Record:
    """The record as float32 on the CPU."""
    from lab.analysis.metrics import run  # whose torchmetrics takes seconds

    with evaluating(model), trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
        record = run(model, batch, want=("record",)).record
    return {name: [None if layer is None else layer.detach().float().cpu() for layer in layers] for name, layers in record.items()}


def layers_of(record: Record, name: str) -> dict[int, Tensor]:
    """The layers that record it, by number."""
    return {i: layer for i, layer in enumerate(record[name]) if layer is not None}


class Phases(Monitor):
    """Phases of a lattice of oscillators: RUN/phases/ holds a snapshot of each look (lab/analysis/snapshots.py).

    To the loggers: sync_order per layer (mean r over real tokens), histograms of theta, omega and kappa, and the delimiter wave.
    """

    kind = "phases"
    needs = frozenset(("theta", "omega", "kappa", "sync_order"))

    def show(self, trainer: pl.Trainer, task: Task, record: Record) -> None:
        from lab.analysis.plots import delimiter_wave

        assert self.batch is not None
        step, loggers, real = trainer.global_step, trainer.loggers, self.real()
        theta, omega, kappa, order = (layers_of(record, name) for name in ("theta", "omega", "kappa", "sync_order"))
        arrays = {
            "tokens": self.batch.inputs.cpu().numpy(),
            "lengths": self.lengths().numpy(),
            "prompt_len": np.int64(task.prompt_len or 0),
            "theta": stacked(list(theta.values())),
            "omega": stacked(list(omega.values())),
            "kappa": stacked(list(kappa.values())),
            "r": stacked(list(order.values())),
            "layers": np.array(list(theta)),
        }
        write_snapshot(trainer.default_root_dir, self.kind, step, **arrays)
        scalars = {f"watch_phases/sync_order_layer_{i}": float(r[real].mean()) for i, r in order.items()}
        for logger in loggers:
            logger.log_metrics(scalars, step)
        shown = {"theta": theta, "omega": omega, "kappa": kappa}
        log_histograms(loggers, {f"watch_phases/{name}_layer_{i}": x for name, of in shown.items() for i, x in of.items()}, step)
        log_figure(loggers, "watch_phases/delimiter_wave", lambda: delimiter_wave(arrays | {"step": np.int64(step)}), step)


class Attention(Monitor):
    """Attention weights: the entropy of each head in nats (mean over real tokens; 0: one token gets all of the weight).

    To the loggers: that number, and a histogram of it over tokens. maps=True also stores the weights of the first sample in
    RUN/attention/ (lab/analysis/snapshots.py) and shows them as a picture. Of an encoder-decoder the same of the attention to the source
    and of the encoder, as watch_cross_attention and watch_encoder_attention.
    """

    kind = "attention"
    needs = frozenset(MAPS)

    def sees(self, names: frozenset[str]) -> bool:
        return bool(self.needs & names)

    def __init__(self, interval: int | None = 200, samples: int = 4, maps: bool = False) -> None:
        super().__init__(interval, samples)
        self.maps = maps

    def show(self, trainer: pl.Trainer, task: Task, record: Record) -> None:
        assert self.batch is not None
        step, loggers, real, n = trainer.global_step, trainer.loggers, self.real(), int(self.lengths()[0])
        arrays: dict[str, Any] = {"tokens": self.batch.inputs[0, :n].cpu().numpy(), "prompt_len": np.int64(task.prompt_len or 0)}
        if self.batch.source is not None:
            S = int(self.source_lengths()[0])
            arrays["source"] = self.batch.source[0, :S].cpu().numpy()
        for kind in (kind for kind in MAPS if kind in record):
            maps, rows, columns = layers_of(record, kind), n, n
            if kind != "attention":
                columns = S
            if kind == "encoder_attention":
                rows, real = S, torch.arange(self.batch.source.shape[1]) < self.source_lengths()[:, None]  # type: ignore[union-attr]
            entropies = {i: torch.special.entr(weights).sum(-1).movedim(1, -1)[real] for i, weights in maps.items()}  # (tokens, H)
            scalars = {
                f"watch_{kind}/entropy_layer_{i}_head_{h}": value
                for i, entropy in entropies.items()
                for h, value in enumerate(entropy.mean(0).tolist())
            }
            for logger in loggers:
                logger.log_metrics(scalars, step)
            log_histograms(loggers, {f"watch_{kind}/entropy_layer_{i}": entropy for i, entropy in entropies.items()}, step)
            arrays[kind] = stacked([weights[0, :, :rows, :columns] for weights in maps.values()]).astype(np.float16)
            arrays["layers" if kind == "attention" else f"{kind}_layers"] = np.array(list(maps))
        if self.maps:
            from lab.analysis.plots import attention_maps

            write_snapshot(trainer.default_root_dir, self.kind, step, **arrays)
            arrays["step"] = np.int64(step)
            for kind in (kind for kind in MAPS if kind in arrays):
                log_figure(loggers, f"watch_{kind}/maps", partial(attention_maps, arrays, kind), step)


class StateSpaces(Monitor):
    """State spaces, of layers that record their eigenvalues A and time steps dt: S4, S4D, S5, Mamba. RUN/state_spaces/ holds a snapshot of
    each look (lab/analysis/snapshots.py).

    To the loggers, per layer: the median dt; the largest |e^{dt A}|; the shortest and the longest memory of a state, -1 / (dt Re A) tokens;
    a histogram of log10 dt; and the pictures of lab/analysis/state_space_plots.py. Where dt depends on the token (Mamba), these take A at
    each channel's median dt over real tokens, and dt_spread is the standard deviation of ln dt over them, mean over channels: 0 for a layer
    that treats all tokens alike.
    """

    kind = "state_spaces"
    needs = frozenset(("eigenvalues", "dt"))

    def __init__(self, interval: int | None = 500, samples: int = 4) -> None:
        super().__init__(interval, samples)

    def show(self, trainer: pl.Trainer, task: Task, record: Record) -> None:
        assert self.batch is not None
        step, loggers, real = trainer.global_step, trainer.loggers, self.real()
        tokens = self.batch.inputs[0, : min(int(self.lengths()[0]), TOKENS)].tolist()
        spaces = {i: state_space(record, i, real, len(tokens)) for i in layers_of(record, "eigenvalues") if is_whole(record, i)}
        if not spaces:
            return
        arrays: dict[str, Any] = {
            "tokens": np.array(tokens),
            "labels": np.array([task.decode([token]) if task.text else str(token) for token in tokens]),
            "text": np.bool_(task.text),
            "prompt_len": np.int64(task.prompt_len or 0),
            "layers": np.array(list(spaces)),
        }
        arrays |= {f"{name}_{i}": array for i, (_, stored, _) in spaces.items() for name, array in stored.items()}
        write_snapshot(trainer.default_root_dir, self.kind, step, **arrays)
        scalars = {f"watch_state_spaces/{name}_layer_{i}": value for i, (values, _, _) in spaces.items() for name, value in values.items()}
        for logger in loggers:
            logger.log_metrics(scalars, step)
        log_histograms(loggers, {f"watch_state_spaces/log10_dt_layer_{i}": log_dt for i, (_, _, log_dt) in spaces.items()}, step)

        from lab.analysis import state_space_plots as draw

        arrays["step"] = np.int64(step)
        log_figure(loggers, "watch_state_spaces/spectrum", lambda: draw.spectrum(arrays), step)
        log_figure(loggers, "watch_state_spaces/dt", lambda: draw.time_steps(arrays), step)
        log_figure(loggers, "watch_state_spaces/responses", lambda: draw.responses(arrays), step)
        if any("token_dt" in stored for _, stored, _ in spaces.values()):
            log_figure(loggers, "watch_state_spaces/selectivity", lambda: draw.selectivity(arrays), step)


def is_whole(record: Record, i: int) -> bool:
    """Whether layer i records all that there is to show of a state space. Weights that are not finite end the training elsewhere."""
    dt = record["dt"][i]
    names = ("eigenvalues", "dt", *(("B", "C") if dt is not None and dt.ndim == 4 else ("kernel",)))
    found = [record[name][i] for name in names if name in record]
    return len(found) == len(names) and all(layer is not None and bool(layer.isfinite().all()) for layer in found)


def state_space(record: Record, i: int, real: Tensor, n: int) -> tuple[dict[str, float], dict[str, np.ndarray], Tensor]:
    """Layer i, its scalars, its part of a snapshot, log10 of all its dt. real: (B, L). n: tokens of the first row in a snapshot."""
    from lab.analysis.state_spaces import DT_EDGES, memory

    A, dt = layers_of(record, "eigenvalues")[i], layers_of(record, "dt")[i]
    selective = dt.ndim == 4  # (B, L, c, 1), of each token
    every = (dt[real] if selective else dt).clamp(min=10 ** DT_EDGES[0])
    typical = every.median(0).values if selective else every  # (c, 1) or (1, n)
    kept = memory(A.numpy(), typical.numpy())
    log_dt = every.log10().flatten()
    some = evenly(typical[:, 0].argsort())
    scalars = {
        "median_dt": float(every.median()),
        "largest_eigenvalue": float(np.exp(-1 / kept).max()),
        "shortest_memory": float(kept.min()),
        "longest_memory": float(kept.max()),
    }
    arrays = {
        "eigenvalues": A[some].numpy(),
        "dt": typical[some].numpy(),
        "dt_counts": np.histogram(log_dt.clamp(max=DT_EDGES[-1]), DT_EDGES)[0],
    }
    if selective:
        scalars["dt_spread"] = float(every.log().std(0, correction=0).mean())
        arrays |= {"token_dt": dt[0, :n, some, 0].numpy()} | {name: layers_of(record, name)[i][0, :n].numpy() for name in ("B", "C")}
    else:
        kernel = layers_of(record, "kernel")[i][..., :n]  # (1 or 2, channels, n)
        some = some if len(A) == kernel.shape[1] else evenly(torch.arange(kernel.shape[1]))  # S5: its channels share all states
        arrays["kernel"] = kernel[:, some].numpy()
    return scalars, arrays | {"channels": some.numpy()}, log_dt


def evenly(ordered: Tensor) -> Tensor:
    """At most CHANNELS of its elements, the first and the last among them."""
    return ordered[torch.linspace(0, len(ordered) - 1, min(len(ordered), CHANNELS)).round().long()]


def stacked(layers: list[Tensor]) -> np.ndarray:
    """All layers as one array; where they differ in shape, the smaller ones are filled up with NaN."""
    shape = [max(sizes) for sizes in zip(*(layer.shape for layer in layers), strict=True)]
    out = np.full((len(layers), *shape), np.nan, np.float32)
    for whole, layer in zip(out, layers, strict=True):
        whole[tuple(map(slice, layer.shape))] = layer
    return out
