"""Measuring time and memory: sides in turn, and the peak of a process of its own. Imports no torch."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TOO_LITTLE = 3  # the exit status of a child that asked for more memory than there is


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
    """What `function` returns in a forked process of its own, through JSON; None where that had too little memory: the system killed it, or
    refused what it asked for.

    RuntimeError where it raised something else, whose traceback is on stderr, or crashed."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # the child starts no thread
        child = os.fork()
    if not child:
        try:
            os.write(writing, json.dumps(function()).encode())
            os._exit(0)
        except BaseException as error:
            if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):  # on a CPU torch has no type of its own for it
                os._exit(TOO_LITTLE)
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ended in (TOO_LITTLE, -signal.SIGKILL):
        return None
    if ended:
        crashed = f"crashed there ({signal.Signals(-ended).name})" if ended < 0 else "failed there"
        raise RuntimeError(f"what was measured in a process of its own {crashed}")
    return json.loads(said)


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
