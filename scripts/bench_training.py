"""What a training step costs, what the framework adds to it, and what the lattice's phases add to attention.

    python scripts/bench_training.py [--size small|documented] [--steps N] [--repeats 5] [--threads 1] [--json FILE] [key=value ...]
    python scripts/bench_training.py --attention 1024 [--repeats 5] [--threads 1] [--json FILE]

For each model: the same batches, model, optimiser, clipping and schedule in a bare PyTorch loop and in the whole training loop of
lab-train (Lightning, metrics.jsonl and TensorBoard every 20 steps), the models in turn, several times in one process. Medians of the
process CPU time per step, which other programs disturb least; a ratio is the median over the turns. Overrides apply to
experiment=copy_reverse_small, or with --size documented to copy_reverse and copy_reverse_vanilla at batch size 16. Validation,
monitoring and checkpoints are left out on both sides.

--attention LENGTH: instead, one mixer of the documented width forward and backward, batch 4: plain attention, the lattice with its two
more columns per head, and those columns padded further.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lab.analysis.metrics import cross_entropy
from lab.config import compose
from lab.mixers import Attention, Lattice
from lab.mixers.attention import widen
from lab.mixers.base import Mixer
from lab.tasks import TrainLoader
from lab.tasks.base import IGNORE
from lab.training.experiment import Experiment, prepare
from lab.training.fit import fit
from lab.training.run import Run

SMALL = {
    "transformer": ["experiment=copy_reverse_small", "model=transformer"],
    "lot wave": ["experiment=copy_reverse_small"],
    "lot wave, no drive": ["experiment=copy_reverse_small", "model.mixer.drive=false"],
    "lot gain": ["experiment=copy_reverse_small", "model.mixer.phase_mode=gain"],
    "lot literal": ["experiment=copy_reverse_small", "model.mixer.phase_mode=literal"],
}
DOCUMENTED = {
    "transformer": ["experiment=copy_reverse_vanilla", "trainer.batch_size=16"],
    "lot wave": ["experiment=copy_reverse", "trainer.batch_size=16"],
}
SIZES = {"small": (SMALL, 200, 20), "documented": (DOCUMENTED, 6, 2)}  # models, vanilla first; steps; steps of warm-up before them
SHARED = (
    "trainer.val_every=1000000", "trainer.checkpoint_every=1000000", "trainer.accelerator=cpu", "trainer.max_epochs=null",
    "task.n_val=64", "task.free_samples=0", "~callbacks.progress", "~callbacks.phases", "~callbacks.attention",
    "~callbacks.state_spaces", "~callbacks.experts",
)  # fmt: skip


class Clock(pl.Callback):
    """CPU seconds between the end of step `warm_up` and the end of the last one."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.warm_up:
            self.start = time.process_time()
        if trainer.global_step == trainer.max_steps:
            self.seconds = time.process_time() - self.start


def bare_loop(experiment: Experiment, warm_up: int) -> float:
    """CPU seconds per step of a plain PyTorch loop."""
    model, settings = experiment.model.train(), experiment.trainer
    optimizer, schedule = experiment.optimizer.build(model, experiment.max_steps)
    loader = TrainLoader(experiment.task.split("train"), settings.batch_size, 1, experiment.max_steps, experiment.seed)
    weights = {name: weight.value for name, weight in experiment.weights.items()}
    start = 0.0
    for step, (batch,) in enumerate(loader):
        if step == warm_up:
            start = time.process_time()
        optimizer.zero_grad()
        out = model(batch.inputs, want=("losses",))
        loss = cross_entropy(out.y, batch.targets).sum() / (batch.targets != IGNORE).sum()
        loss = loss + sum(weights[name] * value for name, value in out.losses.items())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        schedule.step()
    return (time.process_time() - start) / (experiment.max_steps - warm_up)


def lab_loop(experiment: Experiment, composed, warm_up: int) -> float:
    """CPU seconds per step of lab-train's loop."""
    clock = Clock(warm_up)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = Run(folder)
        fit(run, experiment, composed.stored, None, lambda: run.write_config(composed), True, [clock])
    return clock.seconds / (experiment.max_steps - warm_up)


def training(args: argparse.Namespace) -> tuple[Table, list[dict[str, Any]]]:
    models, steps, warm_up = SIZES[args.size]
    steps = (args.steps or steps) + warm_up
    composed = {name: compose([*SHARED, *choice, f"trainer.max_steps={steps}", *args.overrides]) for name, choice in models.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(args.repeats):
        for name, config in composed.items():
            times[name].append((bare_loop(prepare(config.config), warm_up), lab_loop(prepare(config.config), config, warm_up)))

    table = Table(title=f"{' '.join([args.size, *args.overrides])}, CPU, {args.threads} thread(s), medians of {args.repeats}")
    for column in ("model", "bare loop, ms", "lab-train, ms", "steps/s", "overhead", "overhead, ms", "time / vanilla"):
        table.add_column(column, justify="right")
    rows = []
    vanilla = next(iter(times.values()))
    for name, pairs in times.items():
        bare, whole = (statistics.median(each) * 1e3 for each in zip(*pairs, strict=True))
        overhead = statistics.median(b / a for a, b in pairs) - 1
        extra = statistics.median(b - a for a, b in pairs) * 1e3
        ratio = statistics.median(own / plain for (_, own), (_, plain) in zip(pairs, vanilla, strict=True))
        rows.append({"model": name, "bare_ms": bare, "lab_ms": whole, "overhead": overhead, "overhead_ms": extra, "over_vanilla": ratio})
        table.add_row(name, f"{bare:.2f}", f"{whole:.2f}", f"{1e3 / whole:.1f}", f"{overhead:+.1%}", f"{extra:+.2f}", f"{ratio:.2f}")
    return table, rows


class Padded(Lattice):
    """The lattice with heads of `columns` in attention, zeros behind its own."""

    def __init__(self, *args, columns: int) -> None:
        super().__init__(*args)
        self.columns = columns

    def imprint(self, q: Tensor, k: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().imprint(q, k, theta)
        return widen(q, self.columns), widen(k, self.columns)


def one_step(mixer: Mixer, x: Tensor) -> float:
    """CPU seconds."""
    start = time.process_time()
    out = mixer(x, want=("losses",))
    (out.y.sum() + sum(out.losses.values())).backward()
    return time.process_time() - start


def attention(args: argparse.Namespace) -> tuple[Table, list[dict[str, Any]]]:
    D, H = 256, 8
    makers = {"attention": Attention, "lot wave": Lattice} | {
        f"lot wave, {n} columns": partial(Padded, columns=n) for n in (36, 40, 48, 64)
    }
    mixers = {name: make(D, H) for name, make in makers.items()}
    x = torch.randn(4, args.attention, D, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in mixers}
    for _ in range(args.repeats + 1):
        for name, mixer in mixers.items():
            times[name].append(one_step(mixer, x))

    table = Table(title=f"batch 4, length {args.attention}, {args.threads} thread(s), medians of {args.repeats}")
    for column in ("mixer", "forward and backward, ms", "time / attention"):
        table.add_column(column, justify="right")
    rows = []
    for name, turns in times.items():
        ms = statistics.median(turns[1:]) * 1e3  # the first turn warms up
        ratio = statistics.median(own / plain for own, plain in zip(turns[1:], times["attention"][1:], strict=True))
        rows.append({"mixer": name, "ms": ms, "over_attention": ratio})
        table.add_row(name, f"{ms:.1f}", f"{ratio:.2f}")
    return table, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--attention", type=int, metavar="LENGTH")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    table, rows = training(args) if args.attention is None else attention(args)
    Console(width=140).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
