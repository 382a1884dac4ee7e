"""Sweeps. What a pool of processes can meet is played by a stand-in for lab-train that does in a moment what it is told; two real sweeps
show the rest: a job is the plain command, and kill -9 of a job or of the sweep loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, tensors

from lab.cli import train as lab_train
from lab.config import compose
from lab.sweeps import job as job_module
from lab.sweeps import multirun, overview, pool
from lab.training import Run
from lab.training.run import job_path

# Its word is plan.json: {seed: what to do}; each call is a line of calls.txt
STAND_IN = """
import json, multiprocessing, os, pathlib, signal, sys, time
from lab.config import compose
from lab.files import write_json
from lab.training.run import Busy, Run

def finish(run, composed, status="done", **more):
    if composed.config["fresh"]:
        run.clear()
    run.write_config(composed)
    (run.path / "metrics.jsonl").write_text(json.dumps({"step": 4, "val/ce_loss": 1 / (1 + composed.config["seed"])}))
    run.write_job("running")
    run.write_job(status, step=4, **more)

def evaluate(path):
    if pathlib.Path("unscored").exists():
        sys.exit("lab-eval: there is no test split")
    write_json(path / "eval" / "test-best.json", {"step": 4, "metrics": {"exact_match": 0.5}})

first, *_ = words = sys.argv[1:]
with open("calls.txt", "a") as calls:
    calls.write(" ".join([f"{os.environ['OMP_NUM_THREADS']} threads", *words]) + chr(10))
if not any(word.startswith("run_dir=") for word in words):
    evaluate(pathlib.Path(first))
    sys.exit()
composed = compose(words)
run, seed = Run(composed.config["run_dir"]), composed.config["seed"]
match json.loads(pathlib.Path("plan.json").read_text()).get(str(seed), "done"):
    case "done":
        finish(run, composed)
    case "fails":
        finish(run, composed, "failed", reason="the loss is NaN at step 3")
        sys.exit("lab-train: the loss is NaN at step 3")
    case "refuses":
        print("something else")
        sys.exit("lab-train: optimizer: lr is odd")
    case "is killed":  # while it trains
        finish(run, composed, "running")
        os.kill(os.getpid(), signal.SIGKILL)
    case "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    case "loses":  # the race for the lock; the winner is done before the loser is seen
        finish(run, composed)
        evaluate(run.path)
        sys.exit(Busy.exit_code)
    case "waits":
        time.sleep(100)
    case "stops":  # Ctrl-C in the terminal
        def stop(number, frame):
            finish(run, composed, "interrupted", reason=f"stopped by {signal.Signals(number).name}")
            sys.exit(143)
        signal.signal(signal.SIGTERM, stop)
        os.kill(multiprocessing.parent_process().pid, signal.SIGINT)
        time.sleep(100)
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """plan({seed: what to do}) tells the stand-in, which takes the place of both commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "stand_in_eval.py").write_text("import stand_in")
    monkeypatch.setattr(job_module, "TRAIN", "stand_in")
    monkeypatch.setattr(job_module, "EVAL", "stand_in_eval")
    monkeypatch.setattr(overview, "EVAL", "stand_in_eval")

    def write(what: dict[int, str]) -> None:
        (tmp_path / "plan.json").write_text(json.dumps(what))

    write({})
    return write


def sweep(*words: str) -> int:
    return lab_train.main(["-m", "model.d_model=32", *words])


def path(*words: str) -> Path:
    return job_path(compose(["model.d_model=32", *words]))


def lines() -> list[dict]:
    """The table of the one sweep."""
    (file,) = Path("runs/sweeps").glob("*/table.json")
    return json.loads(file.read_text())["rows"]


def calls() -> list[str]:
    """What the stand-in was called with since the last look: "train 1" for the job of seed 1, and "eval"."""
    file = Path("calls.txt")
    found = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return [f"train {line.partition('seed=')[2].split()[0]}" if "seed=" in line else "eval" for line in found]


# ----------------------------------------------------------------------- what becomes of the jobs


def test_failures_are_rows_and_stop_nobody(plan, capsys):
    plan({1: "fails", 2: "refuses", 3: "dies"})
    assert sweep("seed=1,2,3,4") == 1
    out, err = capsys.readouterr()
    assert err == "lab-train: 3 of 4 jobs failed; the same command tries those again\n"
    reasons = ["the loss is NaN at step 3", "optimizer: lr is odd", "killed by SIGKILL", None]
    assert [(row["seed"], row["status"], row["reason"]) for row in lines()][:1] == [(1, "failed", reasons[0])]
    assert [row["reason"] for row in lines()] == reasons
    assert [row["status"] for row in lines()] == ["failed", "failed", "failed", "done"]
    assert (lines()[3]["val ce_loss"], lines()[3]["test exact_match"], lines()[3]["best"]) == (0.2, 0.5, "*")
    assert "[2/4] seed=2  failed: optimizer: lr is odd" in out and f"({path('seed=2')}/job.log)" in out
    log = (path("seed=2") / "job.log").read_text()
    assert log.startswith("$ lab-stand_in model.d_model=32 seed=2 run_dir=") and log.endswith(
        "something else\nlab-train: optimizer: lr is odd\n"
    )
    assert calls() == ["train 1", "train 2", "train 3", "train 4", "eval"]

    plan({2: "refuses"})  # the rest is mended
    assert sweep("seed=1,2,3,4") == 1
    assert calls() == ["train 1", "eval", "train 2", "train 3", "eval"]
    plan({})
    path("seed=4").joinpath("eval", "test-best.json").unlink()
    assert sweep("seed=1,2,3,4") == 0
    assert calls() == ["train 2", "eval", "eval"] and not any("reason" in row for row in lines())
    assert sweep("seed=1,2,3,4", "hydra.launcher.n_jobs=3") == 0 and calls() == []
    assert sweep("seed=2,1") == 0 and calls() == []  # another sweep, the same runs
    assert sweep("seed=1", "fresh=true") == 0 and calls() == ["train 1", "eval"]


def test_a_killed_job_reads_the_same_in_the_line_and_in_the_table(plan, capsys):
    plan({1: "is killed"})
    assert sweep("seed=1") == 1
    (row,) = lines()
    assert row["status"] == "interrupted" and f"  interrupted: {row['reason']}" in capsys.readouterr().out


def test_a_job_that_cannot_be_evaluated(plan, capsys):
    Path("unscored").touch()
    assert sweep("seed=1") == 1
    (row,) = lines()
    assert (row["status"], row["reason"]) == ("done", "trained, but not evaluated: there is no test split")
    Path("unscored").unlink()
    assert sweep("seed=1") == 0 and calls() == ["train 1", "eval", "eval"]


def test_a_job_with_a_lock_is_left_alone(plan, capsys):
    with Run(path("seed=1")).writer():
        assert sweep("seed=1,2") == 0
        assert calls() == ["train 2", "eval"]
        assert "[2/2] seed=1  left alone: another process is at it" in capsys.readouterr().out
    assert sweep("seed=1,2") == 0 and calls() == ["train 1", "eval"]


def test_a_lost_race_is_no_failure(plan, capsys):
    plan({1: "loses"})
    assert sweep("seed=1") == 0
    assert calls() == ["train 1"] and f"[1/1] {path('seed=1')}  done before" in capsys.readouterr().out
    assert sweep("seed=1", "fresh=true") == 0 and calls() == ["train 1"]  # what the winner has finished is fresh
    job = multirun.Sweep([], ["model.d_model=32"], Path("runs/sweeps/x")).job(["seed=1"])
    job.log.write_text(
        "out of memory\n$ lab-train seed=1\nlab-train: r: another process writes this run (process 3); wait for it, or stop it\n"
    )
    assert job.last_line() == "out of memory"  # the rest is of a loser


def test_the_same_sweep_twice_at_once(plan, capsys):
    """The second one neither removes the first one's sweep.json nor forgets why its jobs failed."""
    plan({1: "fails"})
    assert sweep("seed=1,2") == 1
    (folder,) = Path("runs/sweeps").glob("*")
    first, second = (multirun.Sweep([], ["model.d_model=32"], folder) for _ in range(2))
    with first.alive():
        assert not first.file.exists()  # of a sweep that is over
        first.begin([first.job(["seed=1"])])
        first.record(first.job(["seed=1"]), "the loss is NaN")
        with second.alive():
            second.begin([second.job(["seed=1"])])
            assert [job["reason"] for job in first.jobs()] == ["the loss is NaN"]
        with Run(path("seed=1")).writer():
            assert sweep("seed=1,2") == 1  # of which one is left alone
        assert [job["reason"] for job in first.jobs()] == ["the loss is NaN", None]
        second.record(second.job(["seed=1"]), None)
    assert [job["reason"] for job in first.jobs()] == [None, None]


def test_an_error_of_the_sweep_itself_leaves_no_process_unwatched(plan):
    plan({2: "waits"})
    plan_of_sweep = multirun.Sweep([], ["model.d_model=32"], Path("runs/sweeps/x"))

    def record(job, reason):
        raise OSError("no space left")

    workers = pool.Pool(2, overview.Overview(2), record)
    with pytest.raises(OSError, match="no space left"):
        workers.run([plan_of_sweep.job([f"seed={seed}"]) for seed in (1, 2)])
    assert [running.process.exitcode for running in workers.processes] == [-signal.SIGTERM]


def test_an_evaluation_that_was_told_otherwise_does_not_count(plan):
    assert sweep("seed=1") == 0 and calls() == ["train 1", "eval"]
    file, seq_len = path("seed=1") / "eval" / "test-best.json", compose([]).config["task"]["seq_len"]
    for stride, called in ((seq_len // 2, ["eval"]), (seq_len, [])):
        file.write_text(json.dumps({"step": 4, "metrics": {"exact_match": 0.5}, "data": {"stride": stride}}))
        assert sweep("seed=1") == 0 and calls() == called


def test_a_signal_stops_each_job_once_and_starts_no_other(plan, capsys):
    plan({1: "stops"})
    before = signal.getsignal(signal.SIGINT)
    assert sweep("seed=1,2") == 130
    assert calls() == ["train 1"] and signal.getsignal(signal.SIGINT) is before
    assert [(row["status"], row["reason"]) for row in lines()] == [("interrupted", "stopped by SIGTERM"), ("not begun", None)]
    out, err = capsys.readouterr()
    assert "[1/2] seed=1  stopped" in out and err == "lab-train: stopped by SIGINT; the same command goes on\n"


def test_the_jobs_of_other_launchers_and_of_several_batches(plan, capsys):
    plan({1: "fails"})
    assert sweep("seed=1,2", "hydra/launcher=basic") == 1 and calls() == ["train 1", "train 2", "eval"]
    assert [row["status"] for row in lines()] == ["failed", "done"]
    assert sweep("seed=1,3", "hydra.sweeper.max_batch_size=1") == 1 and calls() == ["train 1", "train 3", "eval"]
    assert not Path("outputs").exists() and not Path("multirun").exists()


def test_the_launcher_returns_what_a_sweeper_minimises(plan, tmp_path):
    plan({1: "fails"})
    plan_of_sweep = multirun.Sweep([], ["model.d_model=32"], Path("runs/sweeps/x"))
    failed, done, same = plan_of_sweep.run([["seed=1"], ["seed=3"], ["seed=3"]], n_jobs=2)
    assert failed != failed and done == same == 0.25 and calls().count("train 3") == 1


# ----------------------------------------------------------------------- processes


def test_a_run_that_begins_anew_keeps_its_lock_and_its_log(tmp_path):
    run = Run(tmp_path / "run")
    with run.writer():
        (run.path / "job.log").write_text("$ lab-train")
        run.clear()
        assert Run(run.path).locked() and (run.path / "job.log").exists()


# ----------------------------------------------------------------------- real sweeps

ASSASSIN = """
import multiprocessing, os, pathlib
import pytorch_lightning as pl

class Assassin(pl.Callback):
    def __init__(self, whom: str):
        self.whom = whom
    def on_train_batch_start(self, trainer, module, batch, index):
        mark = pathlib.Path("killed_" + self.whom)
        if trainer.global_step == 8 and not mark.exists():
            mark.touch()
            os.kill({"sweep": multiprocessing.parent_process().pid, "job": os.getpid()}[self.whom], 9)
"""


def test_kill_9_of_a_job_and_of_the_sweep_lose_nothing(tiny, tmp_path, monkeypatch, capsys):
    for key in [key for key in os.environ if key.startswith("PYTEST")]:
        monkeypatch.delenv(key)  # not the user's
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "assassin.py").write_text(ASSASSIN)
    words = ["seed=7", "+callbacks.a._target_=assassin.Assassin", "+callbacks.a.whom=job,sweep", "hydra.launcher.n_jobs=2"]
    line = ["-m", *TINY, *words]
    whole = tensors(tiny("seed=7").last)  # a plain run, in this process
    done = subprocess.run([sys.executable, "-m", "lab.cli.train", *line], capture_output=True, timeout=300)
    assert done.returncode == -9  # the sweep, killed by the second job; the first one has killed itself
    folders = [job_path(compose([*TINY, *words[:2], f"+callbacks.a.whom={whom}"])) for whom in ("job", "sweep")]
    deadline = time.monotonic() + 100
    while {Run(folder).job().get("status") for folder in folders} & {None, "running"} and time.monotonic() < deadline:
        time.sleep(0.1)  # the second job works on without its sweep
    assert [Run(folder).job().get("status") for folder in folders] == ["interrupted", "done"]
    assert lab_train.main(line) == 0
    assert [(row["status"], row["step"], row["reason"] if "reason" in row else None) for row in lines()] == [("done", 12, None)] * 2
    assert all((folder / "eval" / "test-best.json").exists() for folder in folders)
    logs = [(folder / "job.log").read_text() for folder in folders]
    assert "steps: 5 to 12" in logs[0] and logs[1].count("$ lab-train") == 1
    for folder in folders:
        got = tensors(folder / "checkpoints" / "last.ckpt")
        assert [name for name, value in whole.items() if not torch.equal(value, got[name])] == []
    started = [Run(folder).job()["started"] for folder in folders]
    capsys.readouterr()
    assert lab_train.main(line) == 0 and capsys.readouterr().out.count("done before") == 2
    assert [Run(folder).job()["started"] for folder in folders] == started
