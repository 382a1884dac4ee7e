"""What each process of a sweep gets, and which signals the pool takes."""

from __future__ import annotations

import signal

from lab.sweeps import overview, pool


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


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    """nohup lab-train -m ..."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pool.Pool(1, overview.Overview(1), lambda job, reason: None)._signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before)
