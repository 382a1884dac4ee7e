"""Loss by position, up to many times the length that a model was trained on.

    python scripts/extrapolation.py RUNS ... [--times 32] [--windows N] [--plot FILE.png] [--json FILE]

RUNS: runs, sweeps, or folders of them, which are done. Each is read on the windows of its test split that are `times` its seq_len long, by
its best checkpoint, and the loss of each token goes to the octave of its position: the first half of what was trained on, the second,
then twice as far each time. Runs that differ in the seed alone are one line: the mean of their losses, and from the least to the largest.
Losses are bits for each token: of bytes, bits per byte.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from lab.analysis import report
from lab.analysis.metrics import cross_entropy, run
from lab.files import write_json
from lab.models import SequenceModel
from lab.tasks import EvalLoader, Task
from lab.tasks.base import IGNORE
from lab.training.load import load
from lab.training.run import RunError

TOKENS = 16384  # of a batch


@dataclass
class Line:
    """The runs of several seeds. losses (runs, octaves): bits."""

    name: str
    trained: int
    seeds: list[int]
    losses: np.ndarray

    def cells(self) -> list[str]:
        low, mean, high = self.losses.min(0), self.losses.mean(0), self.losses.max(0)
        return [f"{m:.3f} ({a:.3f} - {b:.3f})" for m, a, b in zip(mean, low, high, strict=True)]


def octaves(trained: int, times: int) -> list[tuple[int, int]]:
    """[first, end) of positions."""
    ends = [trained // 2, *(trained * 2**i for i in range(int(math.log2(times)) + 1))]
    return list(zip([0, *ends], ends, strict=False))


@torch.inference_mode()
def by_position(model: SequenceModel, task: Task, times: int, windows: int | None) -> np.ndarray:
    """(times * seq_len,) bits for each token of the test split, a mean over its windows; the first tokens may have none before them."""
    length = task.seq_len * times
    loader = EvalLoader(task.split("test", times), max(1, TOKENS // length))
    sums, counts = np.zeros(length), np.zeros(length)
    for batch in islice(loader, None if windows is None else math.ceil(windows / max(1, TOKENS // length))):
        losses = cross_entropy(run(model, batch, want=("losses",)).y, batch.targets).view_as(batch.targets)
        width = losses.shape[1]
        sums[:width] += losses.double().sum(0).numpy() / math.log(2)
        counts[:width] += (batch.targets != IGNORE).sum(0).numpy()
    return sums / counts


def lines(targets: Sequence[str], times: int, windows: int | None) -> Iterable[Line]:
    found = [row for row in report.rows(targets) if row.status == "done"]
    if not found:
        raise SystemExit(f"extrapolation: no run in {', '.join(targets)} is done")
    keys = [key for key in report.differences(found) if key != "seed"]
    groups: dict[str, list[report.Row]] = {}
    for row in found:
        groups.setdefault(row.experiment, []).append(row)
    for group in groups.values():
        name = ", ".join(f"{key.removeprefix('model.')}={group[0].config.get(key)}" for key in keys) or str(group[0].model)
        losses, seeds = [], []
        for row in sorted(group, key=lambda row: row.config["seed"]):
            print(f"{name}, seed {row.config['seed']}", file=sys.stderr)
            model, task, _ = load(row.path)
            each = by_position(model, task, times, windows)
            losses.append([np.nanmean(each[first:end]) for first, end in octaves(task.seq_len, times)])
            seeds.append(row.config["seed"])
        yield Line(name, task.seq_len, seeds, np.array(losses))


def plot(found: list[Line], times: int, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    for i, line in enumerate(found):
        middle = [math.sqrt((first or end / 2) * end) for first, end in octaves(line.trained, times)]
        axes.plot(middle, line.losses.mean(0), color=f"C{i}", marker="o", markersize=3.5, linewidth=1.2, label=line.name)
        axes.fill_between(middle, line.losses.min(0), line.losses.max(0), color=f"C{i}", alpha=0.2, linewidth=0)
        axes.axvline(line.trained, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position (dotted: the length of training)", size=9)
    axes.set_ylabel("bits a token", size=9)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="+", metavar="RUNS")
    parser.add_argument("--times", type=int, default=32, help="how many times the length of training, a power of 2")
    parser.add_argument("--windows", type=int, help="of the split that are read, about; all if nothing is said")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.times < 1 or args.times & (args.times - 1):
        raise SystemExit(f"extrapolation: --times must be a power of 2, got {args.times}")
    try:
        found = list(lines(args.targets, args.times, args.windows))
    except RunError as error:
        raise SystemExit(f"extrapolation: {error}") from None
    trained = found[0].trained
    if any(line.trained != trained for line in found):
        raise SystemExit("extrapolation: these runs were trained at different lengths; name those of one length")
    table = Table("positions", *(f"{line.name}, n {len(line.seeds)}" for line in found), title="bits a token: mean (least - largest)")
    for (first, end), *cells in zip(octaves(trained, args.times), *(line.cells() for line in found), strict=True):
        table.add_row(f"{first + 1:,} - {end:,}", *cells)
    Console(width=160).print(table)
    if args.plot:
        plot(found, args.times, args.plot)
    if args.json:
        as_json: list[dict[str, Any]] = [
            {"name": line.name, "trained": line.trained, "seeds": line.seeds, "octaves": octaves(line.trained, args.times)}
            | {"bits": line.losses.tolist()}
            for line in found
        ]
        write_json(args.json, {"command": sys.argv, "lines": as_json})


if __name__ == "__main__":
    main()
