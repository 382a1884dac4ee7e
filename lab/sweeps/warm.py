"""Processes that are ready at once. Importing torch and Lightning takes several times as long as a small job does, so one process imports
them, does nothing else, and each job is a fork of it: no number has been drawn there, no device touched, no thread started that would be
missed. The server is that of `multiprocessing`; the first job waits for it, and it ends with the process that asked."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path

IMPORTED = ["lab.training.start", "lab.training.evaluate", "lab.training.loggers", "lab.models", "lab.mixers", "lab.tasks"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The server does not see them: a terminal or a cluster sends them to all processes, and without it nobody would know how jobs end."""


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> ForkServerProcess:
    """`python -m` with these words, in the current folder and in a session of its own, which Ctrl-C in the terminal does not reach. What it
    prints is added to `log`. environment: beside that of this process, with OMP_NUM_THREADS."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    before = dict(os.environ)
    os.environ.update(environment)  # OMP_NUM_THREADS is read when torch is imported
    resource_tracker.ensure_running()  # unblocks signals, so it comes first
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        os.environ.clear()
        os.environ.update(before)
    process = context.Process(target=_run, args=(list(command), log, before | dict(environment)))
    process.start()
    return process


def _run(command: list[str], log: Path, environment: dict[str, str]) -> None:
    import torch

    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # the last line of a log is the last that was printed
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"].partition(",")[0]))  # that of the server is that of the first job
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    sys.argv = list(command)
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
