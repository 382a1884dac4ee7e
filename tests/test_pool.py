"""What each process of a sweep gets, and which signals the pool takes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

from lab.sweeps import overview, pool, warm


def test_each_process_has_its_share_of_the_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(pool, "cores", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    shares = [pool.environment(slot, n_jobs) for n_jobs in (1, 2, 6) for slot in range(n_jobs)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["4,5,6,7", "4,5", "6,7", "4", "5", "6", "7", "4", "5"]
    assert [share["OMP_NUM_THREADS"] for share in shares] == ["8", "4", "4", "1", "1", "1", "1", "1", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert pool.environment(0, 2) == {"OMP_NUM_THREADS": "3"}


def job(program: str, threads: str = "1"):
    Path("said.py").write_text(program)
    return warm.start(["said", "x y"], Path("log"), {"OMP_NUM_THREADS": threads, "LETTER": "x"})


def ended(process) -> int:
    process.join(60)
    return process.exitcode


def server() -> int:
    return forkserver._forkserver._forkserver_pid


def test_a_job_is_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("log").write_text("before\n")
    program = (
        "import os, signal, sys\n"
        "print([name for name in sys.modules if name.startswith(('lab.models', 'lab.mixers', 'lab.tasks', 'lab.ops'))])\n"
        "import torch, numpy\n"
        "print(sys.argv[1:], os.environ['LETTER'], 'HOME' in os.environ, torch.get_num_threads(), __name__, os.getsid(0) == os.getpid())\n"
        "print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, file=sys.stderr)\n"
        "print(os.readlink('/proc/self/fd/0'), sys.stdin.read() == '', file=sys.stderr)\n"
        "kept = open('kept', 'a')\n"
        "kept.write(str(numpy.random.rand()) + chr(10))\n"
        "sys.exit(7)\n"
    )
    assert ended(job(program, threads="2")) == ended(job(program, threads="2")) == 7
    said = "[]\n['x y'] x True 2 __main__ True\n[] True\n/dev/null True\n"
    assert Path("log").read_text() == "before\n" + 2 * said and "LETTER" not in os.environ
    first, second = Path("kept").read_text().splitlines()  # written, though nobody closed it
    assert first != second
    assert ended(job("import sys; sys.exit('a word')", threads="0")) == 1 and Path("log").read_text().endswith("a word\n")


def test_a_script_is_not_run_again_by_its_jobs(tmp_path):
    """One without a guard, started as a file."""
    (tmp_path / "said.py").write_text("print('done')")
    (tmp_path / "script.py").write_text(
        "from pathlib import Path\nfrom lab.sweeps import warm\nprint('once')\n"
        "process = warm.start(['said'], Path('log'), {'OMP_NUM_THREADS': '1'})\nprocess.join()\nprint(process.exitcode)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout, (tmp_path / "log").read_text()) == ("once\n0\n", "done\n"), done.stderr


def test_signals_to_all_processes_do_not_reach_the_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = job("import pathlib, time\nwhile not pathlib.Path('go').exists(): time.sleep(0.05)")
    before = server()
    for number in warm.SIGNALS:
        os.kill(before, number)
    time.sleep(0.5)
    Path("go").touch()
    assert ended(process) == 0 and ended(job("")) == 0 and server() == before


def test_a_job_whose_server_dies_is_told_to_stop(tmp_path, monkeypatch):
    """Nobody watches it any more: it saves, and the same command goes on."""
    monkeypatch.chdir(tmp_path)
    process = job(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('saved').touch(), sys.exit(143)))\n"
        "pathlib.Path('there').touch()\ntime.sleep(60)"
    )
    wait_for("there")
    os.kill(server(), signal.SIGKILL)
    assert ended(process) == warm.LOST
    of = SimpleNamespace(status="interrupted", path=tmp_path, reason=lambda *_: "exit code 255")
    told = []
    workers = pool.Pool(1, overview.Overview(1), lambda job, reason: told.append(reason))
    monkeypatch.setattr(workers.overview, "ended", lambda *_: None)
    workers._ended(pool.Running(of, "lab.cli.train", 0, 0, process), deque())
    wait_for("saved")
    assert told[0].startswith("the process that jobs are forked from was killed") and ended(job("")) == 0  # of another server


def wait_for(name: str) -> None:
    deadline = time.monotonic() + 60
    while not Path(name).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert Path(name).exists()


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    """nohup lab-train -m ..."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pool.Pool(1, overview.Overview(1), lambda job, reason: None)._signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before)
