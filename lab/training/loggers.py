"""Where scalars and pictures go: metrics.jsonl in every run, one logger more by the config. All of them live in the run folder.

A node of the group `logger` has `build(folder, first_step)`; what it returns is a Lightning logger that starts after step `first_step`.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from lab.config import ConfigError
from lab.files import by_step, read_rows, strict, write_text
from lab.training.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ScalarFile(Logger):
    """A file of scalars in the run folder; what Lightning asks of a logger besides is answered here."""

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """hparams.yaml has them."""


class JsonLines(ScalarFile):
    """metrics.jsonl: a row {"step": ..., name: value} for each log. Rows after `first_step` are dropped: a killed run writes them again."""

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        super().__init__()
        self.path = folder / "metrics.jsonl"
        self._drop_rows(first_step)

    @rank_zero_only
    def _drop_rows(self, first_step: int) -> None:
        if self.path.exists():
            kept = (row for row in read_rows(self.path) if 0 < first_step >= row["step"])  # from the start: step 0 is written again, too
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(strict({"step": step, **metrics})) + "\n")


class CsvTable(ScalarFile):
    """metrics.csv: one row for each step. A view of metrics.jsonl, which is written first: no resume can double a row.

    A row of a new step is appended; one that adds to a step that is there, or brings a new column, makes the table anew.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path, self.source = folder / "metrics.csv", folder / "metrics.jsonl"
        self.columns: list[str] = []
        self.last: int | None = None
        self._write()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step == self.last or not set(metrics) <= set(self.columns):
            self._write()
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, ["step", *self.columns], lineterminator="\n").writerow({"step": step, **strict(metrics)})
        self.last = step

    @rank_zero_only
    def _write(self) -> None:
        rows = by_step(read_rows(self.source))
        self.columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        self.last = max(rows, default=None)
        text = io.StringIO()
        writer = csv.DictWriter(text, ["step", *self.columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"step": step, **row} for step, row in rows.items())
        write_text(self.path, text.getvalue())


class Csv:
    """The node of logger=csv."""

    def build(self, folder: Path, first_step: int) -> Logger:
        return CsvTable(folder)


class TensorBoard:
    """The node of logger=tensorboard: events in the run folder itself, so that `tensorboard --logdir runs/` shows each run by its path."""

    def build(self, folder: Path, first_step: int) -> Logger:
        # purge_step hides what a killed run wrote after the checkpoint that it now continues from; without one, its step 0 as well
        return TensorBoardLogger(save_dir=folder, name="", version="", purge_step=first_step + 1 if first_step else 0)


class Wandb:
    """The node of logger=wandb: Weights & Biases, its files in RUN/wandb, the run's folder as its name and its id.

    name: None is the path of the run. Online it needs a key (`wandb login`); WANDB_MODE=offline needs none. ConfigError otherwise, before
    anything is written.
    """

    def __init__(self, project: str = "lab", entity: str | None = None, name: str | None = None) -> None:
        self.project, self.entity, self.name = project, entity, name
        if find_spec("wandb") is None:
            raise ConfigError("logger=wandb needs the package wandb, which is not installed: pip install wandb")
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.api.api_key:
            raise ConfigError("logger=wandb finds no key: `wandb login` stores one, and WANDB_MODE=offline works without")

    def build(self, folder: Path, first_step: int) -> Logger:
        run = Run(folder)
        name = self.name or str(folder)
        logger = _WandbRun(name, folder, project=self.project, entity=self.entity, id=run_id(run))
        logger.log_hyperparams(run.config())
        return logger


class _WandbRun(WandbLogger):
    """Ends its W&B run with the training, so that the next one in this process has a run of its own."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        self.experiment.finish(exit_code=int(status != "success"))


def run_id(run: Run) -> str:
    """Of a run on W&B: what was begun anew in the same folder is another run, what was resumed is the same one."""
    import hashlib

    hparams = run.hparams()
    return hashlib.sha256(f"{run.path.resolve()} {hparams['created']}".encode()).hexdigest()[:12]


# ----------------------------------------------------------------------- beyond scalars, where a logger can show it


def log_figure(loggers: Sequence[Logger], tag: str, draw: Callable[[], Figure], step: int) -> None:
    """draw() is called once, and not at all where no logger shows pictures."""
    showing = [logger for logger in loggers if isinstance(logger, TensorBoardLogger | WandbLogger)]
    if not showing:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(draw())
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # (height, width, 3)
    for logger in showing:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, pixels, step, dataformats="HWC")
        else:
            logger.log_image(tag, [pixels], step)


def log_histograms(loggers: Sequence[Logger], values: Mapping[str, torch.Tensor], step: int) -> None:
    for logger in loggers:
        for tag, value in values.items():
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram(tag, value, step)
            elif isinstance(logger, WandbLogger):
                import wandb

                logger.experiment.log({tag: wandb.Histogram(value.flatten().tolist()), "trainer/global_step": step})
