"""A pool of processes, and nothing else: who may write a run, what it resumes and when it is done is decided in the processes."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from lab.sweeps import warm
from lab.sweeps.job import Job
from lab.sweeps.overview import Overview
from lab.training.run import Busy, Interrupted, Run

POLL = 0.1  # seconds


@dataclass
class Running:
    """A command of a job that is running."""

    job: Job
    command: str
    slot: int  # which share of the machine it has
    log_start: int  # where in the job's log its own lines begin
    process: BaseProcess

    @property
    def pid(self) -> int:
        assert self.process.pid is not None  # it has been started
        return self.process.pid


class Pool:
    """Runs jobs, `n_jobs` at a time. record(job, reason) is called for each at its end; the reason is None unless it failed.
    threads: of each process."""

    def __init__(self, n_jobs: int, overview: Overview, record: Callable[[Job, str | None], None], threads: int | None = None) -> None:
        self.n_jobs, self.overview, self.record, self.threads = n_jobs, overview, record, threads
        self.processes: list[Running] = []
        self.left: list[Job] = []  # because another process is at them
        self.met: set[Path] = set()  # the folders of all jobs that another process was at
        self.received: list[int] = []  # signals
        self.passed_on = 0  # how many of them the processes have got

    def run(self, jobs: Sequence[Job]) -> None:
        """Interrupted, after all processes have saved and stopped, if this process was told to stop."""
        try:
            with self._signals(), self.overview:
                self._work(deque(jobs))
                self._work(deque(self.left))  # perhaps they are free by now
                for job in self.left:
                    self.overview.ended(job, "left alone: another process is at it")
        finally:  # there are some only after an error of our own: nobody would watch them
            for running in self.processes:
                running.process.terminate()
            for running in self.processes:
                running.process.join()
        if self.received:
            number = self.received[0]
            raise Interrupted(f"stopped by {signal.Signals(number).name}; the same command goes on", number)

    def _work(self, waiting: deque[Job]) -> None:
        self.left = []
        while self.processes or (waiting and not self.received):
            while waiting and len(self.processes) < self.n_jobs and not self.received:
                self._begin(waiting.popleft())
            self._pass_signals_on()
            self.overview.show([(running.job, running.command) for running in self.processes])
            time.sleep(POLL if self.processes else 0)
            for running in [running for running in self.processes if running.process.exitcode is not None]:
                self.processes.remove(running)
                self._ended(running, waiting)

    def _begin(self, job: Job) -> None:
        if Run(job.path).locked():
            self.left.append(job)
            self.met.add(job.path)
            return
        command = job.next_command(met=job.path in self.met)
        if command is None:
            self.record(job, None)
            self.overview.ended(job, "done before")
        else:
            used = {running.slot for running in self.processes}
            self._start(job, command, next(slot for slot in range(self.n_jobs) if slot not in used))

    def _start(self, job: Job, command: list[str], slot: int) -> None:
        job.path.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            log.write(f"$ {shlex.join(['lab-' + command[0].rpartition('.')[2], *command[1:]])}\n".encode())
            log.flush()
            start = log.tell()
        process = warm.start(command, job.log, environment(slot, self.n_jobs, self.threads))
        self.processes.append(Running(job, command[0], slot, start, process))

    def _ended(self, running: Running, waiting: deque[Job]) -> None:
        job, code = running.job, running.process.exitcode
        assert code is not None
        lost = code == warm.LOST and _told_to_stop(running)
        if code == Busy.exit_code:  # lost a race for the lock; what the winner made of it is seen when its turn comes again
            waiting.append(job)
            self.met.add(job.path)
            return
        following = job.next_command(after=running.command) if code == 0 else None
        if following and not self.received:
            self._start(job, following, running.slot)
            return
        if self.received and (code or following):
            self.overview.ended(job, "stopped")
            return
        reason = None
        if lost:
            reason = "the process that jobs are forked from was killed, and this one told to stop; the same command goes on with it"
        elif code:
            reason = job.reason(running.command, running.pid, code, running.log_start)
        self.record(job, reason)
        self.overview.ended(job, f"{job.status}: {reason}" if reason else "done")

    # ------------------------------------------------------------------ signals

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heeded = [number for number in warm.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
        before = {number: signal.signal(number, self._receive) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    def _pass_signals_on(self) -> None:
        """The first signal lets each process finish its step and save; the second stops it at once; the third kills it."""
        until = len(self.received)  # one may come meanwhile
        for count in range(self.passed_on + 1, until + 1):
            if count == 1:
                self.overview.say("stopping: the jobs finish their step and save; once more stops them at once")
            for running in self.processes:
                with suppress(ProcessLookupError):  # it has just ended
                    if count < 3:
                        running.process.terminate()
                    else:
                        os.killpg(running.pid, signal.SIGKILL)
        self.passed_on = until


def _told_to_stop(running: Running) -> bool:
    """Whether it was still at work: it saves and stops, for nobody watches it any more."""
    try:
        os.killpg(running.pid, signal.SIGTERM)
    except ProcessLookupError:  # it has ended with that code itself
        return False
    return True


def environment(slot: int, n_jobs: int, threads: int | None = None) -> dict[str, str]:
    """The share of the machine that one of `n_jobs` processes gets: threads, as many as are told or fit, and GPUs where there are any."""
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // n_jobs))}
    if threads is not None:
        share["OMP_NUM_THREADS"] = str(threads)
    devices = gpus()
    if devices:
        each = max(1, len(devices) // n_jobs)
        first = slot * each % len(devices)
        share["CUDA_VISIBLE_DEVICES"] = ",".join(devices[first : first + each])
    return share


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """The devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
