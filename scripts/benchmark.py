"""What the benchmarks share: timing in turn, peak memory, the allocator, peers that may be missing, and where the figures go."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = {
    "gguf": "gguf",
    "laminarnet": "laminarnet",
    "mambapy": "mambapy",
    "s5": "s5-pytorch",
    "transformers": "transformers",
}  # module -> what pip calls it
ALLOCATORS = ("default", "reuse")
Row = dict[str, Any]


class Timing(NamedTuple):
    ms: float  # median
    spread: float  # half the distance of the quartiles, as a part of the median


def in_turn(
    sides: Mapping[str, Callable[[], object]], repeats: int, budget: float = 8.0, clock: Callable[[], float] = time.process_time
) -> dict[str, Timing]:
    """Times the sides one after the other, `repeats` times around, so that a busy machine disturbs all of them alike. A side that has
    used up its budget, in seconds, is left out of the later rounds; a fast one runs several times in each, for 20 ms or so."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    calls = {}
    for name, side in sides.items():
        first = seconds(side, 1, clock)  # this one warms up
        calls[name] = max(1, min(200, round(0.02 / max(first, 1e-6))))
    for _ in range(repeats):
        for name, side in sides.items():
            if sum(taken[name]) * calls[name] < budget:
                taken[name].append(seconds(side, calls[name], clock))
    return {name: timing(times) for name, times in taken.items()}


def seconds(side: Callable[[], object], calls: int = 1, clock: Callable[[], float] = time.process_time) -> float:
    """Of one call, as a mean."""
    start = clock()
    for _ in range(calls):
        side()
    return (clock() - start) / calls


def timing(seconds: Sequence[float]) -> Timing:
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
    return Timing(median * 1e3, (quartiles[2] - quartiles[0]) / 2 / median)


def in_child(function: Callable[[], Any]) -> Any:
    """What `function` returns in a forked process of its own, through JSON; None where the system ended that, for want of memory."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, json.dumps(function()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ended > 0:
        raise SystemExit(ended)
    return None if ended else json.loads(said)


def peak(prepare: Callable[[], Callable[[], object]]) -> float | None:
    """MiB by which the resident memory rises, at its peak, while what `prepare` returns runs, in a process and on a thread of its own:
    other threads do not survive a fork."""

    def measured() -> float:
        import torch

        torch.set_num_threads(1)
        run = prepare()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)  # memory that is free already would not count
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
        before = mebibytes("self/status", "VmRSS")
        run()
        return mebibytes("self/status", "VmHWM") - before

    return in_child(measured)


def mebibytes(file: str, key: str) -> float:
    lines = (Path("/proc") / file).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1]) / 1024


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


def with_allocator(name: str, threads: int, measure: Callable[[str], dict[str, list[Row]]]) -> dict[str, list[Row]]:
    """The rows of one allocator, or of both, each in a process of its own; reuse: freed memory stays
    (lab/memory.py)."""
    import torch

    from lab.memory import reusing_memory, why_not_reuse

    if name == "both":
        parts = [in_child(lambda name=name: with_allocator(name, threads, measure)) for name in ALLOCATORS]
        return {key: [row for part in parts for row in part[key]] for key in parts[0]}
    if name == "reuse" and why_not_reuse():
        raise SystemExit(why_not_reuse())
    torch.set_num_threads(threads)
    with reusing_memory() if name == "reuse" else nullcontext():
        return measure(name)


def report(lists: dict[str, list[Row]], threads: int) -> dict[str, Any]:
    import torch

    from lab.ops import native

    return {
        "command": shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": {
            "cpu": cpu_name(), "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__,
            "python": platform.python_version(), "libc": " ".join(platform.libc_ver()), "kernels": native.SAYS,
        },
        **lists,
    }  # fmt: skip


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def said(value: float | None, pattern: str = "{:.3g}") -> str:
    return "" if value is None else pattern.format(value)
