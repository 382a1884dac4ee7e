"""What a second thread gains each op: the cases of bench_ops.py, forward and backward.

    python scripts/bench_threads.py [--allocator default|reuse|both] [--only NAME] [--json FILE]

Medians of the wall-clock time, one thread and two in turn: the machine must have nothing else to do.
"""

from __future__ import annotations

import os
import time
from functools import partial

import benchmark
import torch
from bench_ops import Case, cases, prepared, runner, table
from rich.console import Console

from lab.analysis import measuring
from lab.files import write_json


def measure(case: Case, repeats: int) -> benchmark.Row:
    run = runner(case, case.lab, prepared(case))

    def with_threads(count: int) -> None:
        torch.set_num_threads(count)
        run()

    timings = measuring.in_turn({"one": partial(with_threads, 1), "two": partial(with_threads, 2)}, repeats, clock=time.perf_counter)
    one, two = timings["one"], timings["two"]
    row: benchmark.Row = {"name": f"{case.name}, 2 threads", "shape": case.shape, "against": "1 thread", "note": "wall clock"}
    return {**row, "lab_ms": two.ms, "peer_ms": one.ms, "ratio": one.ms / two.ms, "spread": one.spread + two.spread}


def main() -> None:
    args = benchmark.arguments(__doc__.splitlines()[0]).parse_args()
    if (os.cpu_count() or 1) < 2:
        raise SystemExit("bench_threads: this machine has one core")
    chosen = [case for case in cases(args.quick) if args.only in case.name and case.backward and "," not in case.name]

    def rows(allocator: str) -> dict[str, list[benchmark.Row]]:
        return {"rows": [{**measure(case, args.repeats), "allocator": allocator} for case in chosen]}

    # Both allocators in this process, one after the other: the kernels keep to one thread in a forked one.
    allocators = benchmark.ALLOCATORS if args.allocator == "both" else (args.allocator,)
    measured = [benchmark.with_allocator(name, 2, rows) for name in allocators]
    report = benchmark.report({"rows": [row for part in measured for row in part["rows"]]}, 2)
    Console(width=200).print(table(report["rows"]))
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
