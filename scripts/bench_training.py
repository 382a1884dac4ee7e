"""What a training step costs, and what the framework adds to it.

    python scripts/bench_training.py [--steps 200] [--repeats 5] [--threads 1] [--json FILE] [key=value ...]

For each model: the same batches, model, optimiser, clipping and schedule in a bare PyTorch loop and in the whole training loop of
lab-train (Lightning, metrics.jsonl and TensorBoard every 20 steps), in turn, several times in one process; medians of the process
CPU time per step, which other programs disturb least. Overrides apply to experiment=copy_reverse_small; validation, monitoring and
checkpoints are left out on both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table

from lab.analysis.metrics import cross_entropy
from lab.config import compose
from lab.tasks import TrainLoader
from lab.tasks.base import IGNORE
from lab.training.experiment import Experiment, prepare
from lab.training.fit import fit
from lab.training.run import Run

MODELS = {
    "transformer": ["model=transformer"],
    "lot wave": ["model=lot"],
    "lot wave, no drive": ["model=lot", "model.mixer.drive=false"],
    "lot gain": ["model=lot", "model.mixer.phase_mode=gain"],
    "lot literal": ["model=lot", "model.mixer.phase_mode=literal"],
}
WARM_UP = 20
SHARED = (
    "experiment=copy_reverse_small", "trainer.val_every=1000000", "trainer.checkpoint_every=1000000", "trainer.accelerator=cpu",
    "task.n_val=64", "task.free_samples=0", "~callbacks.progress", "~callbacks.phases", "~callbacks.attention",
    "~callbacks.state_spaces",
)  # fmt: skip


class Clock(pl.Callback):
    """CPU seconds between the end of step WARM_UP and the end of the last one."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == WARM_UP:
            self.start = time.process_time()
        if trainer.global_step == trainer.max_steps:
            self.seconds = time.process_time() - self.start


def bare_loop(experiment: Experiment) -> float:
    """CPU seconds per step of a plain PyTorch loop."""
    model, settings = experiment.model.train(), experiment.trainer
    optimizer, schedule = experiment.optimizer.build(model, experiment.max_steps)
    loader = TrainLoader(experiment.task.split("train"), settings.batch_size, 1, experiment.max_steps, experiment.seed)
    weights = {name: weight.value for name, weight in experiment.weights.items()}
    start = 0.0
    for step, (batch,) in enumerate(loader):
        if step == WARM_UP:
            start = time.process_time()
        optimizer.zero_grad()
        out = model(batch.inputs, want=("losses",))
        loss = cross_entropy(out.y, batch.targets).sum() / (batch.targets != IGNORE).sum()
        loss = loss + sum(weights[name] * value for name, value in out.losses.items())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        schedule.step()
    return (time.process_time() - start) / (experiment.max_steps - WARM_UP)


def lab_loop(experiment: Experiment, composed) -> float:
    """CPU seconds per step of lab-train's loop."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = Run(folder)
        fit(run, experiment, composed.stored, None, lambda: run.write_config(composed), True, [clock])
    return clock.seconds / (experiment.max_steps - WARM_UP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    table = Table(title=f"copy_reverse_small {' '.join(args.overrides)}, CPU, {args.threads} thread(s), medians of {args.repeats}")
    for column in ("model", "bare loop, ms", "lab-train, ms", "steps/s", "overhead", "overhead, ms", "time / vanilla"):
        table.add_column(column, justify="right")
    rows = []
    for name, choice in MODELS.items():
        steps = args.steps + WARM_UP
        composed = compose(
            [*SHARED, *choice, f"trainer.max_steps={steps}", *args.overrides],
        )
        pairs = [(bare_loop(prepare(composed.config)), lab_loop(prepare(composed.config), composed)) for _ in range(args.repeats)]
        bare, whole = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        extra = statistics.median(b - a for a, b in pairs)
        rows.append({"model": name, "bare_ms": bare * 1e3, "lab_ms": whole * 1e3, "overhead": ratio - 1, "overhead_ms": extra * 1e3})
        table.add_row(
            name,
            f"{bare * 1e3:.2f}",
            f"{whole * 1e3:.2f}",
            f"{1 / whole:.0f}",
            f"{ratio - 1:+.1%}",
            f"{extra * 1e3:+.2f}",
            f"{whole * 1e3 / rows[0]['lab_ms']:.2f}",
        )
    Console(width=140).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
