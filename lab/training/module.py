"""The LightningModule: cross-entropy plus weighted auxiliary losses, one optimiser step per window of micro-batches.

Optimisation is Lightning's "manual" mode, because a window (see lab/tasks/loader.py) is what makes an optimiser step: the
cross-entropy is averaged over the scored tokens of the whole window on all ranks, which no single micro-batch knows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ParallelStrategy
from torch import Tensor
from torch.utils import _pytree as pytree

from lab.analysis.finite import first_non_finite
from lab.analysis.metrics import Evaluation, bytes_of, cross_entropy, run
from lab.mixers.base import State
from lab.models import SequenceModel
from lab.tasks import Batch, Task
from lab.tasks.base import IGNORE
from lab.training.checkpoint import random_states, restore_random_states, seed_everything
from lab.training.loss_weights import LossWeight
from lab.training.optimizer import AdamW
from lab.training.run import RunError
from lab.training.settings import Settings

ADVICE = "try a lower optimizer.lr, a longer warm-up or trainer.grad_clip"


class LabModule(pl.LightningModule):
    """A model with what trains it. `identity` is stored in each checkpoint as the entry "lab": config, choices, hashes, versions.

    stream_steps: steps of an epoch of streams (lab/tasks/loader.py), over which each micro-batch continues the detached state of its
    predecessor; None: every row begins anew.
    """

    def __init__(
        self, model: SequenceModel, task: Task, optimizer: AdamW, weights: dict[str, LossWeight], settings: Settings, max_steps: int,
        seed: int, identity: dict[str, Any], stream_steps: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.model, self.task, self.optimizer, self.weights, self.settings = model, task, optimizer, weights, settings
        self.max_steps, self.seed, self.identity = max_steps, seed, identity
        self.evaluation = Evaluation(task, model, task.free_samples)
        self.validation: dict[str, float] = {}  # of the last one, in full; Lightning rounds its copy to float32
        self.tables: dict[str, Any] = {}  # of the last validation: by_position, ...
        self.received_signal = 0  # by this process
        self.stop_signal = 0  # the same, agreed by all ranks at the beginning of a step
        self.grad_norm: Tensor | None = None
        self.layer_grad_norms: dict[str, float] = {}
        self.stream_steps = stream_steps
        self._carried: list[State] = []  # of each micro-batch of a window, where streams are continued
        self._logging = False  # whether this step is logged
        self._done: list[tuple[Batch, State, Tensor]] = []  # the micro-batches of this step, what they continue, and their losses
        self._stored_states: list[dict[str, Any]] = []  # from a checkpoint, until training starts
        bits = "bits_per_byte" in task.metrics and task.token_bytes is not None
        self.register_buffer("token_bytes", torch.from_numpy(task.token_bytes) if bits else None, persistent=False)
        self.token_bytes: Tensor | None
        self.spent: dict[str, float] = {"train/tokens": 0, "train/seconds": 0.0}  # up to _clock, over all processes that were at it
        self._clock: float | None = time.perf_counter()  # None while it stands still
        self._tokens = 0  # since then; padding does not count

    def configure_optimizers(self) -> Any:
        optimizer, schedule = self.optimizer.build(self.model, self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    # ------------------------------------------------------------------ a step

    def training_step(self, window: list[Batch], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        scored, tokens = self._window_totals(window)
        self._logging = (self.global_step + 1) % self.settings.log_every == 0 or self.global_step + 1 == self.max_steps
        sums: dict[str, Tensor] = {}
        if self.stream_steps is not None and self.global_step % self.stream_steps == 0:
            self._carried = [self.model.init_state(len(batch.inputs), device=batch.inputs.device) for batch in window]
        before = self._carried or [None] * len(window)
        after: list[State] = []

        def closure() -> None:
            optimizer.zero_grad()
            self._done.clear()
            after.clear()
            for i, batch in enumerate(window):
                with self._sync_gradients(i == len(window) - 1):
                    loss, parts, state = self._loss(batch, before[i], scored, tokens, len(window))
                    self.manual_backward(loss)
                self._done.append((batch, before[i], parts["loss"]))
                after.append(state)
                for name, value in parts.items():
                    sums[name] = sums[name] + value if name in sums else value

        optimizer.step(closure)
        if self._carried:
            self._carried = after
        self._tokens += tokens
        if self._logging:
            self._log_step(sums)
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def _loss(self, batch: Batch, before: State, scored: Tensor, tokens: int, n_micro: int) -> tuple[Tensor, dict[str, Tensor], State]:
        """The share of one micro-batch in the window's loss, and its detached parts; they add up over the window. before: the state that it
        continues; then the one after it, detached, comes with them.

        Cross-entropy is averaged over the window's scored tokens, the auxiliary losses over its real tokens. DDP averages gradients
        over ranks, so the share of a rank is scaled by their number. Losses that are functions of means are taken of each micro-batch,
        over all ranks, and averaged over the window, so they depend a little on trainer.accumulate; an evaluation takes them of its
        whole split.
        """
        world = self.trainer.world_size
        out = run(self.model, batch, before, want=("losses",) if before is None else ("losses", "state"))
        ce = cross_entropy(out.y, batch.targets).sum() / scored * world
        losses = {name: value * (real_tokens(batch) / tokens * world) for name, value in out.losses.items()}
        if world > 1 and out.means:
            means, of_all = self._over_ranks(out.means, real_tokens(batch))
            losses |= {name: value * (of_all / tokens) for name, value in self.model.losses_of(means).items()}
        total = ce
        for name, value in losses.items():
            weight = self.weights[name].at(self.global_step, self.max_steps)
            if weight:
                total = total + weight * value
        parts = {"loss": total.detach(), "ce_loss": ce.detach()} | {name: value.detach() for name, value in losses.items()}
        if self._logging and "exact_match" in self.task.metrics:
            right = (out.y.argmax(-1) == batch.targets) | (batch.targets == IGNORE)
            parts["exact_match"] = right.all(1).float().mean() / n_micro
        if self._logging and "accuracy" in self.task.metrics:
            parts["accuracy"] = (out.y.argmax(-1) == batch.targets).float().mean() / n_micro
        if self._logging and self.token_bytes is not None:
            parts["bytes_per_token"] = bytes_of(batch.targets, self.token_bytes) / scored * world
        return total, parts, self.model.map_state(Tensor.detach, out.state)

    def _sync_gradients(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients travel between ranks once per window, with its last micro-batch."""
        strategy = self.trainer.strategy
        return nullcontext() if last or not isinstance(strategy, ParallelStrategy) else strategy.block_backward_sync()

    def _window_totals(self, window: list[Batch]) -> tuple[Tensor, int]:
        """Scored (at least 1) and real tokens of the window on all ranks; with them travels the signal that any rank has received."""
        scored = torch.cat([batch.targets.flatten() for batch in window]).ne(IGNORE).sum()
        tokens, self.stop_signal = sum(map(real_tokens, window)), self.received_signal
        if self.trainer.world_size > 1:
            mine = torch.stack([scored, *(torch.full_like(scored, n) for n in (tokens, self.stop_signal))])
            every = self._of_all_ranks(mine)
            scored, tokens, self.stop_signal = every[:, 0].sum(), int(every[:, 1].sum()), int(every[:, 2].max())
        return scored.clamp(min=1), tokens

    def _of_all_ranks(self, mine: Tensor) -> Tensor:
        """(ranks, ...) of a tensor that each rank has."""
        if self.trainer.world_size == 1:
            return mine[None]
        every = [torch.empty_like(mine) for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather(every, mine)
        return torch.stack(every)

    def _over_ranks(self, means: Mapping[str, Tensor], n: int) -> tuple[dict[str, Tensor], Tensor]:
        """The means over this micro-batch's real tokens on all ranks, from those over the n of this rank; and the number of these tokens.

        All ranks get the same values and so the same loss; the gradient of each goes to its own share of them alone, times the number
        of ranks, as DDP averages gradients. So their sum is complete, and the backward pass needs no communication beside DDP's.
        """
        flat = torch.cat([mean.flatten() for mean in means.values()]) * n
        sums = self._of_all_ranks(torch.cat([flat.detach(), flat.new_full((1,), n)])).sum(0)
        of_all = sums[-1].clamp(min=1)
        mine = flat * (self.trainer.world_size / of_all)
        values = sums[:-1] / of_all + (mine - mine.detach())
        parts = values.split([mean.numel() for mean in means.values()])
        return {name: part.view(mean.shape) for (name, mean), part in zip(means.items(), parts, strict=True)}, of_all

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are complete, synced and unscaled here: the norms are measured, then clipped if asked for."""
        if self._logging and self.settings.log_layer_grad_norms:
            self.layer_grad_norms = layer_grad_norms(self.model)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self.settings.grad_clip if self.settings.grad_clip is not None else float("inf")
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        seen = self.grad_norm  # the same on every rank: what one rank made non-finite, all have got
        if self.trainer.world_size == 1:
            seen = seen + sum(loss for _, _, loss in self._done)
        if not math.isfinite(seen):  # waits for the device, once per step
            self._stop_non_finite()

    def _stop_non_finite(self) -> None:
        """Raises RunError, the same sentence on every rank, before the optimiser takes the step."""
        sentence = None
        failed = next(((batch, before, float(loss)) for batch, before, loss in self._done if not torch.isfinite(loss)), None)
        if failed is not None:
            batch, before, value = failed
            with torch.no_grad():
                where = first_non_finite(self.model, lambda: run(self.model, batch, before, want=("losses",)))
            sentence = f"the loss is {value} at step {self.global_step + 1}; the first non-finite value is in {where}; {ADVICE}"
        sentences = [sentence]
        if self.trainer.world_size > 1:
            sentences *= self.trainer.world_size
            torch.distributed.all_gather_object(sentences, sentence)
        sentence = next((found for found in sentences if found), None)
        if sentence is None and self.settings.precision == "16-mixed":
            return  # an overflow of float16: the scaler skips the step and lowers its scale
        name = next((n for n, p in self.model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()), "")
        raise RunError(
            sentence or f"the gradient, not the loss, is infinite or NaN at step {self.global_step + 1}, first in {name}; {ADVICE}"
        )

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        self._lap()
        self._clock = None  # neither validation nor the saving that follows it counts as training time
        self.evaluation.reset(self.trainer.world_size)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluation.update(self.model, batch)

    def on_validation_epoch_end(self) -> None:
        metrics, self.tables = self.evaluation.compute(self.model)
        weighted = sum(weight.at(self.global_step, self.max_steps) * metrics[name] for name, weight in self.weights.items())
        self.validation = {"val/loss": metrics["ce_loss"] + weighted} | {f"val/{name}": value for name, value in metrics.items()}
        self.log_dict(self.validation, logger=False)  # for callbacks that monitor; loggers get them with the step of the optimiser
        self._write(self.validation | self.spent)

    def on_validation_end(self) -> None:
        self._clock = time.perf_counter()

    # ------------------------------------------------------------------ logs

    def _log_step(self, sums: dict[str, Tensor]) -> None:
        """Once every log_every steps, from tensors that are there anyway: `self.log` in each would cost more than a small model's step."""
        values = self._of_all_ranks(torch.stack(list(sums.values()))).mean(0)
        sums = dict(zip(sums, values, strict=True))
        if "bits_per_byte" in self.task.metrics:
            sums["bits_per_byte"] = sums["ce_loss"] / math.log(2) / sums.pop("bytes_per_token", 1.0)
        metrics = {f"train/{name}": float(value) for name, value in sums.items()}
        derived = self.model.derived_metrics({name: sums[name] for name in self.weights})
        metrics |= {f"train/{name}": float(value) for name, value in derived.items()}
        metrics["train/grad_norm"] = float(self.grad_norm) if self.grad_norm is not None else 0.0
        metrics["train/lr"] = max(group["lr"] for group in self.optimizers().param_groups)  # type: ignore[union-attr]
        tokens, seconds = self._lap()
        metrics["train/tokens_per_second"] = tokens / max(seconds, 1e-9)
        self._write(metrics | {f"grad_norm/{name}": value for name, value in self.layer_grad_norms.items()})

    def _lap(self) -> tuple[int, float]:
        """The tokens and seconds of training since the last one, which `spent` has from now on."""
        tokens, seconds = self._tokens, 0.0
        if self._clock is not None:
            now = time.perf_counter()
            seconds, self._clock = now - self._clock, now
        self._tokens = 0
        self.spent = {name: before + more for (name, before), more in zip(self.spent.items(), (tokens, seconds), strict=False)}
        return tokens, seconds

    def _write(self, metrics: dict[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.global_step)

    # ------------------------------------------------------------------ start, checkpoints

    def on_train_start(self) -> None:
        """Sets the random states right before the first step: what Lightning draws while it starts up does not count."""
        rank = self.trainer.global_rank
        if len(self._stored_states) == self.trainer.world_size:
            restore_random_states(self._stored_states[rank])
        else:
            seed_everything(self.seed + self.global_step + rank)
        self._stored_states = []
        if self.stream_steps is not None and self.global_step % self.stream_steps and not self._carried:
            raise RunError(f"the checkpoint of step {self.global_step} has no carried_states to go on with; begin anew with fresh=true")
        # Rows of all ranks, as the loader shares them out.
        self._carried = [self.model.map_state(partial(self._share, rank=rank), state) for state in self._carried]
        schedule: Any = self.lr_schedulers()
        for group, lr in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):  # max_steps may not be what it was
            group["lr"] = lr * self.optimizer.factor(self.global_step, self.max_steps)
        self._clock, self._tokens = time.perf_counter(), 0

    def _share(self, rows: Tensor, rank: int) -> Tensor:
        return rows.chunk(self.trainer.world_size)[rank].to(self.device, copy=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lab"] = self.identity
        self._lap()
        checkpoint["spent"] = self.spent  # on the steps that made these weights; what a kill lost is not in it
        states = [random_states()]
        if self.trainer.world_size > 1:
            states *= self.trainer.world_size
            torch.distributed.all_gather_object(states, states[0])
        checkpoint["random_states"] = states  # of each rank
        if self._carried:
            carried = [self.model.map_state(lambda leaf: leaf.to("cpu", copy=True), state) for state in self._carried]
            ranks = [carried]
            if self.trainer.world_size > 1:
                ranks *= self.trainer.world_size
                torch.distributed.all_gather_object(ranks, carried)
            checkpoint["carried_states"] = [pytree.tree_map(joined, *of_ranks) for of_ranks in zip(*ranks, strict=True)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._stored_states = checkpoint["random_states"]
        self._carried = checkpoint.get("carried_states", [])
        self.spent = checkpoint.get("spent", {})  # of a version that did not count: unknown, and not written


def joined(*of_ranks: Any) -> Any:
    """The rows of all ranks, of one leaf of a state."""
    return torch.cat(of_ranks) if isinstance(of_ranks[0], Tensor) else of_ranks[0]


def real_tokens(batch: Batch) -> int:
    return batch.inputs.numel() if batch.lengths is None else int(batch.lengths.sum())


def layer_grad_norms(model: SequenceModel) -> dict[str, float]:
    """The norm of the gradient of each block and of each part outside of the blocks; their squares add up to that of the whole."""
    parts = {name: module for name, module in model.named_children() if module is not model.blocks}
    parts |= {f"block_{i}": block for i, block in enumerate(model.blocks)}
    grads = {name: [p.grad for p in module.parameters() if p.grad is not None] for name, module in parts.items()}
    return {name: float(torch.nn.utils.get_total_norm(found)) for name, found in grads.items() if found}
