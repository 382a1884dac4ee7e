"""Callbacks: the progress that a person sees, and when checkpoints are written."""

from __future__ import annotations

import math
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from rich.console import Console

from lab.training.run import MONITOR, Interrupted, Run, RunError


class Progress(RichProgressBar):
    """A rich bar where there is a terminal, and one line per validation everywhere, logs included."""

    def __init__(self, refresh_every: int = 10) -> None:
        super().__init__(refresh_rate=refresh_every if Console(stderr=True).is_terminal else 0, leave=False)

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"  # to Lightning, all of it is one epoch

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.is_global_zero:
            shown = {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            print(f"step {trainer.global_step:>6}/{trainer.max_steps}  val  {text}", flush=True)


class Checkpoints(pl.Callback):
    """last.ckpt every `every` steps and at the end, best.ckpt by the lowest MONITOR; stops a run that was sent a signal.

    The last of the callbacks, so that what the others change at the end of a step (an average of the weights) is saved as well.
    Where a validation is due at the same step, the save waits for it: a resume goes on after the validation, and misses none.
    """

    def __init__(self, run: Run, every: int) -> None:
        self.run, self.every = run, every
        self.best: dict[str, Any] = {"value": float("inf")}  # value, step, metrics and tables of the best validation
        self.saved_step = -1
        self.received: int | None = None  # the number of the signal
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}

    # ------------------------------------------------------------------ when to save

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step >= trainer.max_steps:
            trainer.should_stop = True  # Lightning then validates once more, whatever val_every says
        elif step % int(trainer.val_check_batch or 1) and (step % self.every == 0 or self._stopping(pl_module)):
            self._save_last(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        validation: dict[str, float] = pl_module.validation  # type: ignore[assignment]
        value = validation[MONITOR]
        if not math.isfinite(value):
            raise RunError(f"{MONITOR} is {value} at step {trainer.global_step}: has the validation split any scored target?")
        if value < self.best["value"]:
            metrics = {name.removeprefix("val/"): score for name, score in validation.items()}
            self.best = {"value": value, "step": trainer.global_step, "metrics": metrics, "tables": pl_module.tables}
            trainer.save_checkpoint(self.run.best)
            if trainer.is_global_zero:
                link(self.run.path / "checkpoint.pt", Path("checkpoints") / self.run.best.name)
        if trainer.global_step % self.every == 0 or trainer.global_step >= trainer.max_steps or self._stopping(pl_module):
            self._save_last(trainer, pl_module)

    def _save_last(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.run.last)
        self.saved_step = trainer.global_step
        if trainer.is_global_zero and not (self.run.path / "checkpoint.pt").is_symlink():
            link(self.run.path / "checkpoint.pt", Path("checkpoints") / self.run.last.name)
        number = self._stopping(pl_module)
        if number and trainer.global_step < trainer.max_steps:
            raise Interrupted(f"stopped by {signal.Signals(number).name} after step {trainer.global_step}, which is saved", number)

    def _stopping(self, pl_module: pl.LightningModule) -> int:
        """The signal that any rank was sent by the beginning of this step, on which all ranks agree; 0: none."""
        return pl_module.stop_signal  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = {"tables": {"by_position": []}} | state_dict["best"]

    # ------------------------------------------------------------------ signals

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        pl_module.received_signal = self.received or 0  # type: ignore[assignment]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.saved_step != trainer.global_step:  # another callback ended training early
            self._save_last(trainer, pl_module)
        self._restore_signals()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_signals()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """The first signal asks for a stop after the current step; a second one stops at once."""
        if os.getpid() != self._pid:  # a forked loader worker: the process that it works for decides
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        print(f"{signal.Signals(number).name}: finishing the step and saving; once more stops at once", flush=True)

    def _restore_signals(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


def link(path: Path, target: Path) -> None:
    """A relative symbolic link, replaced atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)
