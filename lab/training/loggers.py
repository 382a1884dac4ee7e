"""Where scalars go: metrics.jsonl in every run, TensorBoard by the config. Both live in the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from lab.training.run import strict, write_text


class JsonLines(Logger):
    """metrics.jsonl: a row {"step": ..., name: value} for each log. Rows after `first_step` are dropped: a killed run writes them again."""

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        super().__init__()
        self.path = folder / "metrics.jsonl"
        self._drop_rows(first_step)

    @rank_zero_only
    def _drop_rows(self, first_step: int) -> None:
        if self.path.exists():
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in read_rows(self.path) if row["step"] <= first_step))

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """hparams.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(strict({"step": step, **metrics})) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class TensorBoard:
    """The node of logger=tensorboard: events in the run folder itself, so that `tensorboard --logdir runs/` shows each run by its path."""

    def build(self, folder: Path, first_step: int) -> Logger:
        # purge_step hides what a killed run wrote after the checkpoint that it now continues from
        return TensorBoardLogger(save_dir=folder, name="", version="", purge_step=first_step + 1)
