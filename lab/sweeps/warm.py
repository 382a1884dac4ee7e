"""Processes that are ready at once. Importing torch and Lightning takes several times as long as a small job does, so one process, the
server, imports them and does nothing else, and each job is a fork of it. Of lab the server has nothing: a job reads what is on the disk.

The server is that of `multiprocessing`. It starts with the first job, and ends when this process and all jobs have.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

IMPORTED = ["torch", "pytorch_lightning", "torchmetrics", "torch.utils.tensorboard", "hydra", "omegaconf", "rich.live", "matplotlib.figure"]
METHOD = "forkserver" if sys.platform == "linux" else "spawn"  # a fork of what has loaded Apple's frameworks may crash
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The server does not see them: a terminal or a cluster sends them to all processes, and without it nobody would know how jobs end."""
LOST = 255  # the exit code of a job whose server has died: how it will end is not known


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> BaseProcess:
    """`python -m` with these words, in the current folder and in a session of its own, which Ctrl-C in the terminal does not reach. What it
    prints is added to `log`. environment: beside that of this process, with OMP_NUM_THREADS. OSError if it cannot be started."""
    context = multiprocessing.get_context(METHOD)
    process: BaseProcess = context.Process(target=_run, args=(list(command), log, os.environ | dict(environment)))  # type: ignore[attr-defined]
    try:
        if METHOD == "forkserver":
            context.set_forkserver_preload(IMPORTED)
            with _set(environment), _deaf():
                forkserver.ensure_running()
        with _without_main():
            process.start()
    except (EOFError, ConnectionError) as error:
        raise OSError(f"the process that jobs are forked from has ended, perhaps with a message above ({error})") from error
    return process


@contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    """For the start of the server: OMP_NUM_THREADS is read when torch is imported."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _deaf() -> Iterator[None]:
    """A process that is started within it never sees SIGNALS."""
    resource_tracker.ensure_running()  # unblocks signals, so it comes first
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


@contextmanager
def _without_main() -> Iterator[None]:
    """Each process that multiprocessing starts runs the script of its parent first, under another name; a job has no use for that."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _run(command: list[str], log: Path, environment: dict[str, str]) -> None:
    """In the job: what a Python of its own would find, then what it would do at its end."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # the last line of a log is the last that was printed
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")
    os.environ.clear()
    os.environ.update(environment)
    _begin_anew(environment["OMP_NUM_THREADS"].partition(",")[0])
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    sys.argv = list(command)
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        _end()


def _begin_anew(threads: str) -> None:
    """What was decided when the server imported it."""
    import numpy as np
    import torch

    np.random.seed()
    if threads.isdecimal() and int(threads) > 0:
        torch.set_num_threads(int(threads))


def _end() -> None:
    """multiprocessing leaves by os._exit, which neither runs what is registered nor writes what is buffered."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()
    for each in gc.get_objects():
        if issubclass(type(each), io.IOBase):
            with suppress(Exception):  # it is closed, or read only
                each.flush()
    ctypes.CDLL(None).fflush(None)
