"""The loaders of the corpora against the training that they feed: tokens/s of the batches alone, and of the smallest experiment's steps.

    python scripts/bench_loader.py [--threads 1] [--repeats 9] [--only NAME] [--json FILE]

A loader's step is what lab-train waits for with num_workers=0: a window of batches from the memory-mapped file, shuffled or from streams.
A training step is model, gradients and optimiser of the smallest experiment on that corpus, without logs and validation. All in one
process, in turn, medians of the process CPU time. enwik8 is stood in for by as many bytes of the standard library, repeated: the time to
find a window in a file of that size is measured, nothing about its text.
"""

from __future__ import annotations

import itertools
import os
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import benchmark
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from lab.analysis import measuring
from lab.config import compose
from lab.files import write_json
from lab.tasks import StandardLibrary, TrainLoader
from lab.tasks.prepared import Tokens
from lab.tasks.windows import Windows
from lab.training.experiment import Experiment, prepare

AIM = 10  # times the training
SOURCE = f"task.path={sysconfig.get_path('stdlib')}/*.py"
CORPORA = {  # name: the smallest experiment, and what else is said of it
    "stdlib": ["experiment=stdlib_transformer"],
    "enwik8": ["experiment=stdlib_transformer", "task.seq_len=256"],
    "text, bytes": ["experiment=text_small_mamba", SOURCE, "task.tokenizer=bytes", "task.vocab_size=257", "task.documents=file"],
    "text, bpe": ["experiment=text_small_mamba", SOURCE, "task.documents=file"],
}
QUICK = ["model.d_model=16", "model.n_layers=1", "trainer.batch_size=2", "task.seq_len=16"]
ENWIK8 = 90_000_000  # bytes to train on


def training_split(name: str, experiment: Experiment, folder: Path, quick: bool) -> Windows:
    split = experiment.task.split("train")
    if name != "enwik8":
        return split  # type: ignore[return-value]
    text, size = StandardLibrary().bytes_of("train"), 1_000_000 if quick else ENWIK8
    file = folder / "as-large-as-enwik8.bin"
    with file.open("wb") as out:
        while out.tell() < size:
            out.write(np.asarray(text[: size - out.tell()]).tobytes())
    return Windows(Tokens(file, "uint8", 0, size), split.context, split.context, start=10)


def loading(split: Windows, experiment: Experiment, streams: bool) -> Callable[[], object]:
    settings = experiment.trainer
    loader = TrainLoader(split, settings.batch_size, settings.accumulate, 10**9, experiment.seed, streams=streams)
    steps = itertools.cycle(range(loader.windows.steps_per_epoch))
    return lambda: loader.windows[next(steps)]


def training(split: Windows, experiment: Experiment) -> Callable[[], object]:
    settings, model = experiment.trainer, experiment.model
    (batch,) = next(iter(TrainLoader(split, settings.batch_size, 1, 1, experiment.seed)))
    optimizer, _ = experiment.optimizer.build(model, 1000)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten()).backward()
        optimizer.step()

    return step


def rows(name: str, folder: Path, quick: bool, repeats: int) -> Iterator[benchmark.Row]:
    experiment = prepare(compose([*CORPORA[name], *(QUICK if quick else [])]).config)
    split = training_split(name, experiment, folder, quick)
    tokens = experiment.trainer.batch_size * split.context
    sides = {name: loading(split, experiment, name == "streams") for name in ("shuffled", "streams")}
    sides["training"] = training(split, experiment)
    timings = measuring.in_turn(sides, repeats)
    per_second = {side: 1e3 * tokens / timing.ms for side, timing in timings.items()}
    for side in ("shuffled", "streams"):
        row: benchmark.Row = {"name": name, "order": side, "batch_size": experiment.trainer.batch_size, "seq_len": split.context}
        row |= {"tokens_per_second": per_second[side], "training": per_second["training"], "spread": timings[side].spread}
        yield row | {"ratio": per_second[side] / per_second["training"], "aim": AIM}


def main() -> None:
    parser = benchmark.arguments(__doc__.splitlines()[0])
    parser.set_defaults(allocator="default", repeats=9)
    args = parser.parse_args()

    def measured(allocator: str) -> dict[str, list[benchmark.Row]]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LAB_DATA"] = folder
            names = [name for name in CORPORA if args.only in name]
            print(f"preparing {', '.join(names)}", file=sys.stderr)
            return {"loaders": [row for name in names for row in rows(name, Path(folder), args.quick, args.repeats)]}

    report = benchmark.report(benchmark.with_allocator(args.allocator, args.threads, measured), args.threads)
    table = Table(
        "corpus", "order", "batch x length", "loader, tokens/s", "±", "training, tokens/s", "ratio", title=f"loaders; aim: {AIM}x"
    )
    for row in report["loaders"]:
        figures = [f"{row['tokens_per_second']:,.0f}", f"{row['spread']:.0%}", f"{row['training']:,.0f}", f"{row['ratio']:.0f}"]
        table.add_row(row["name"], row["order"], f"{row['batch_size']} x {row['seq_len']}", *figures)
    Console(width=120).print(table)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
