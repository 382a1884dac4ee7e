"""What the benchmarks share: timing in turn, peak memory, the allocator, peers that may be missing, and where the figures go."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = {"mambapy": "mambapy", "s5": "s5-pytorch", "transformers": "transformers"}  # module -> what pip calls it
ALLOCATORS = ("default", "reuse")
Row = dict[str, Any]


class Timing(NamedTuple):
    ms: float  # median
    spread: float  # half the distance of the quartiles, as a part of the median


def in_turn(
    sides: Mapping[str, Callable[[], object]], repeats: int, budget: float = 20.0, clock: Callable[[], float] = time.process_time
) -> dict[str, Timing]:
    """Times the sides one after the other, `repeats` times around, so that a busy machine disturbs all of them alike. A side that has
    used up its budget, in seconds, is left out of the later rounds; a fast one runs several times in each, 20 ms at least."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    calls = {}
    for name, side in sides.items():
        side()  # once for imports and memory
        start = clock()
        side()
        first = clock() - start
        calls[name] = max(1, min(200, round(0.02 / max(first, 1e-6))))
        if first > budget / repeats:
            taken[name].append(first)
    for _ in range(repeats):
        for name, side in sides.items():
            if sum(taken[name]) * calls[name] < budget:
                start = clock()
                for _ in range(calls[name]):
                    side()
                taken[name].append((clock() - start) / calls[name])
    return {name: timing(times) for name, times in taken.items()}


def timing(seconds: Sequence[float]) -> Timing:
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
    return Timing(median * 1e3, (quartiles[2] - quartiles[0]) / 2 / median)


def peak(prepare: Callable[[], Callable[[], object]]) -> float:
    """MiB by which the resident memory rises, at its peak, while what `prepare` returns runs: in a forked process of its own, so before
    this one has computed anything (threads do not survive a fork, and memory that is free again would not count)."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            run = prepare()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
            before = status("VmRSS")
            run()
            os.write(writing, str(status("VmHWM") - before).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return float(said) if said else math.nan  # nothing: it was killed


def status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) / 1024


def use_allocator(name: str) -> None:
    """reuse: glibc keeps the memory of freed tensors. By default it maps and unmaps every large one, and each page costs 2 us again."""
    if name == "reuse":
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            if not libc.mallopt(option, ctypes.c_int(value)):
                raise SystemExit("mallopt refused: --allocator reuse needs glibc")


def missing(error: ModuleNotFoundError) -> str:
    """What a row says instead of figures."""
    name = (error.name or "").split(".")[0]
    if name not in PACKAGES:
        raise error
    return f"not installed: pip install {PACKAGES[name]}"


def version(name: str) -> str:
    """s5-pytorch 0.2.1, or the name alone where it is not installed."""
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return name


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--allocator", choices=(*ALLOCATORS, "both"), default="both", help="both: one process for each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument("--json", type=Path, help="where the figures go")
    return parser


def both_allocators() -> dict[str, Any]:
    """The report of a process for each allocator, as one."""
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ALLOCATORS:
            file = Path(folder) / f"{name}.json"
            command = [sys.executable, *sys.argv, "--allocator", name, "--json", str(file)]  # the last ones win
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            reports.append(json.loads(file.read_text()))
    return {**reports[0], "rows": [row for report in reports for row in report["rows"]]}


def report(rows: list[Row]) -> dict[str, Any]:
    import torch

    from lab.ops import native

    words = [word for word in sys.argv[1:]]
    return {
        "command": " ".join(["python", f"scripts/{Path(sys.argv[0]).name}", *words]),
        "date": datetime.date.today().isoformat(),
        "machine": {
            "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "libc": " ".join(platform.libc_ver()), "kernels": native.SAYS,
        },
        "rows": rows,
    }  # fmt: skip


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def said(value: float | None, pattern: str = "{:.3g}") -> str:
    return "" if value is None else pattern.format(value)
