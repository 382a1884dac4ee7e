"""A token far out costs what one at the beginning costs: time of a step and size of the state at two positions.

    python scripts/bench_far.py [--threads 1] [--repeats 9] [--only NAME] [--json FILE]

4 layers, d_model 256, vocabulary 256, float32, batch 1. Each position is reached by a prefill in chunks, so its state is the true one.
Then the model's own step decodes TOKENS tokens greedily, each time from the same state; both positions in one process, in turn, medians
of the process CPU time. The ratio is the far time over the near one. Models whose state grows are not here: scripts/bench_decoding.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import benchmark
import torch
from bench_models import CHUNK, QUICK, SIZES, VOCABULARY, lab_model
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils import _pytree as pytree

from lab.analysis import measuring
from lab.files import write_json
from lab.models import SequenceModel
from lab.models.base import evaluating

MODELS = ("laminar", "mamba")
TOKENS = 64  # as many of them complete a window of each stratum at either position
POSITIONS, NEAR = (10, 1_000_000), (10, 200)


def states_at(model: SequenceModel, positions: tuple[int, ...]) -> list[Any]:
    """The state after so many random tokens; positions ascend, and a later one continues an earlier one."""
    generator, state, done, states = torch.Generator().manual_seed(0), None, 0, []
    for position in positions:
        while done < position:
            chunk = torch.randint(0, VOCABULARY, (1, min(CHUNK, position - done)), generator=generator)
            state = model(chunk, state, want=("state", "last")).state
            done += chunk.shape[1]
        states.append(state)
    return states


def steps(model: SequenceModel, state: Any) -> Callable[[], object]:
    def run() -> object:
        token, now = torch.zeros(1, dtype=torch.long), state
        for _ in range(TOKENS):
            logits, now = model.step(token, now)
            token = logits.argmax(-1)
        return token

    return run


def rows(name: str, sizes: tuple[int, int], positions: tuple[int, ...], repeats: int) -> Iterator[benchmark.Row]:
    model = lab_model(name, *sizes).eval()
    print(f"{name}: {positions[-1]:,} tokens", file=sys.stderr)
    states = states_at(model, positions)
    timings = measuring.in_turn({str(at): steps(model, state) for at, state in zip(positions, states, strict=True)}, repeats)
    for at, state in zip(positions, states, strict=True):
        timing = timings[str(at)]
        bytes_of = sum(t.nbytes for t in pytree.tree_leaves(state))
        row: benchmark.Row = {"name": name, "position": at, "ms": timing.ms / TOKENS, "spread": timing.spread, "state_bytes": bytes_of}
        yield row | {"ratio": timing.ms / timings[str(positions[0])].ms}


def main() -> None:
    parser = benchmark.arguments(__doc__.splitlines()[0])
    parser.set_defaults(allocator="default", repeats=9)
    args = parser.parse_args()
    sizes, positions = (QUICK, NEAR) if args.quick else (SIZES, POSITIONS)

    def measured(allocator: str) -> dict[str, list[benchmark.Row]]:
        with evaluating(nn.Identity()):
            return {"far": [row for name in MODELS if args.only in name for row in rows(name, sizes, positions, args.repeats)]}

    report = benchmark.report(benchmark.with_allocator(args.allocator, args.threads, measured), args.threads)
    table = Table("model", "position", "ms a token", "±", "ratio", "state, bytes", title="a token at two positions")
    for row in report["far"]:
        figures = [f"{row['ms']:.3f}", f"{row['spread']:.0%}", f"{row['ratio']:.2f}", f"{row['state_bytes']:,}"]
        table.add_row(row["name"], f"{row['position']:,}", *figures)
    Console(width=120).print(table)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
