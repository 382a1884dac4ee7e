"""What each process of a sweep gets, and which signals the pool takes."""

from __future__ import annotations

import os
import signal
from multiprocessing import forkserver
from pathlib import Path

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


def test_a_job_is_a_process_of_its_own(tmp_path, monkeypatch):
    """Also after signals that a terminal or a cluster sends to all processes: the server of the forks does not see them, the jobs do."""
    monkeypatch.chdir(tmp_path)
    Path("said.py").write_text(
        "import os, signal, sys, torch\n"
        "print(sys.argv[1:], os.environ['LETTER'], 'HOME' in os.environ, torch.get_num_threads(), __name__, os.getsid(0) == os.getpid())\n"
        "print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, file=sys.stderr)\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    Path("log").write_text("before\n")
    for code, threads in ((0, 1), (7, 2)):
        process = warm.start(["said", str(code)], Path("log"), {"OMP_NUM_THREADS": str(threads), "LETTER": "x"})
        process.join(60)
        assert process.exitcode == code
        for number in warm.SIGNALS:
            os.kill(forkserver._forkserver._forkserver_pid, number)
    said = [f"['{code}'] x True {threads} __main__ True\n[] True\n" for code, threads in ((0, 1), (7, 2))]
    assert Path("log").read_text() == "before\n" + "".join(said) and "LETTER" not in os.environ


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    """nohup lab-train -m ..."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pool.Pool(1, overview.Overview(1), lambda job, reason: None)._signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before)
