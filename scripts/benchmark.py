"""What the benchmarks share: the allocator, peers that may be missing, and where the figures go. lab.analysis.measuring measures."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

from lab.analysis import measuring

PACKAGES = {
    "gguf": "gguf",
    "laminarnet": "laminarnet",
    "mambapy": "mambapy",
    "s5": "s5-pytorch",
    "transformers": "transformers",
}  # module -> what pip calls it
ALLOCATORS = ("default", "reuse")
Row = dict[str, Any]


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
        parts = [measuring.in_child(lambda name=name: with_allocator(name, threads, measure)) for name in ALLOCATORS]
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
