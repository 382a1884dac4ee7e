"""lab-compare. The runs are played by a stand-in for the pool, in this process; at the end one comparison is of real ones."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import comparison_file
import pytest
from comparison_file import FILE, run
from conftest import TINY

from lab.cli import compare as lab_compare
from lab.config import compose
from lab.files import write_json
from lab.sweeps import multirun
from lab.sweeps.job import EVAL, Job
from lab.sweeps.pool import environment
from lab.training.run import Interrupted, Run

file = comparison_file.file  # fixture


def found() -> dict:
    (path,) = Path("runs/comparisons").glob("*/comparison.json")
    return json.loads(path.read_text())


@pytest.fixture
def player(monkeypatch):
    """Plays lab-train and lab-eval. player.plan: {(model, seed): score, or a reason to fail}; player.calls: what was called."""

    class Player:
        plan: dict = {}
        calls: list[str] = []
        threads = None

        def __init__(self, n_jobs, overview, record, threads=None):
            self.record, Player.threads = record, threads

        def run(self, jobs):
            for job in jobs:
                key = (job.composed.choices["model"], job.composed.config["seed"])
                what, done = self.plan.get(key, 1.0), Run(job.path)
                if what == "stop":
                    raise Interrupted("stopped by SIGTERM; the same command goes on", signal.SIGTERM)
                command = job.next_command()
                if command is None:
                    self.record(job, None)
                    continue
                Player.calls.append("{} {} {}".format(command[0].rpartition(".")[2], *key))
                if not done.exists():
                    done.path.mkdir(parents=True, exist_ok=True)
                    done.write_config(job.composed)
                    done.write_job("running")
                if what == "no scores":
                    done.write_job("done", reason=None, step=4)
                    self.record(job, f"trained, but not evaluated: {what}")
                    continue
                if isinstance(what, str):
                    done.write_job("failed", reason=what)
                    self.record(job, what)
                    continue
                spent = ({"train/tokens": 32 * step, "train/seconds": 0.5 * step * key[1]} for step in (2, 4))
                rows = [{"step": 2, "val/ce_loss": 0.9, "val/exact_match": 0.3}, {"step": 4, "val/ce_loss": 0.5, "val/exact_match": 0.7}]
                rows = [row | more for row, more in zip(rows, spent, strict=True)]
                (done.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                done.write_job("done", reason=None, step=4)
                far = "not applicable (max_len 16)" if key[0] == "transformer" else {"exact_match": what}
                scores = {"step": 4, "params": 99, "metrics": {"exact_match": what}, "references": {"best constant": 0.25}}
                write_json(done.path / "eval" / "test-best.json", scores | {"by_length": {"16": {"exact_match": what}, "32": far}})
                write_json(done.path / "metrics.json", scores)
                self.record(job, None)

    Player.calls = []
    monkeypatch.setattr(multirun, "Pool", Player)
    return Player


def test_a_comparison_goes_on_where_it_was_stopped(player, capsys):
    player.plan = {("mamba", 1): "the loss is NaN", ("transformer", 2): "stop"}
    assert run("tiny.yaml", "threads=3") == 143 and player.threads == 3
    assert player.calls == ["train transformer 1", "train mamba 1"]
    (folder,) = Path("runs/comparisons").iterdir()
    assert [(run["status"], run["reason"]) for run in found()["runs"]] == [
        ("done", None), ("failed", "the loss is NaN"), ("not begun", None), ("not begun", None)
    ]  # fmt: skip
    capsys.readouterr()
    assert lab_compare.main(["--show", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "the loss is NaN" in out and "mamba: seed 1: failed: the loss is NaN; seed 2: not run yet" in out

    player.plan, player.calls[:] = {("mamba", 1): "the loss is NaN", ("mamba", 2): 0.75}, []
    assert run("tiny.yaml") == 1  # a failure stops nobody
    out, err = capsys.readouterr()
    assert player.calls == ["train mamba 1", "train transformer 2", "train mamba 2"]
    few = "lab-compare: tiny: with 2 seeds no difference can be significant, it takes 6\n"
    assert err == few + "lab-compare: 1 of 4 runs are not done; the same command goes on with them\n"
    assert "mamba: seed 1: failed: the loss is NaN" in out and "0.750 (n 1); 1 of 2 seeds" in out
    assert "without mamba: seed 1: failed: the loss is NaN" in out and "1 of 2" in out  # of the table of models
    assert "attention and mamba: cannot tell, for of 2 seeds 1 is paired" in out

    player.plan, player.calls[:] = {("mamba", 1): 0.75}, []
    assert run("tiny.yaml") == 0 and player.calls == ["train mamba 1"]
    assert run("tiny.yaml", "--check") == 1 and player.calls == ["train mamba 1"]
    assert "2 of 2 expectations did not hold: mamba: test/exact_match at 2x >= 0.9 (not held); mamba - attention" in capsys.readouterr().err


def test_other_lengths_score_the_same_runs_again_and_train_none(player):
    assert run("tiny.yaml", "models=mamba", "seeds=[1]") == 0 and player.calls == ["train mamba 1"]
    folder = Path(found()["runs"][0]["folder"])
    for lengths, scored in ([1, 2], None), ([2], None), ([1, 4], [1, 2, 4]), ([1, 8], [1, 2, 8]):
        composed = compose(["--config=tiny.yaml", "model=mamba", "seed=1", f"task.eval_lengths={lengths}"])
        job = Job(["--config=tiny.yaml"], ["model=mamba", "seed=1", f"task.eval_lengths={lengths}"], composed)
        assert job.path == folder
        asked = [f"task.eval_lengths={scored}"]
        assert job.next_command() == (None if scored is None else [EVAL, str(folder), *asked]), "those scored before stay"


def test_scores_that_cannot_be_had_are_asked_for_in_the_table(player, capsys):
    """Runs that are done, of which a second lab-eval fails."""
    assert run("tiny.yaml", "models=mamba", "seeds=[1]") == 0
    player.plan = {("mamba", 1): "no scores"}
    capsys.readouterr()
    assert run("tiny.yaml", "models=mamba", "seeds=[1]", "task.eval_lengths=[1,2,4]") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "done" in out and "trained, but not evaluated" in out


def test_runs_on_other_data_and_of_other_code(player, capsys):
    """Data may change behind a config that stays, and code always does."""
    assert run("tiny.yaml", "--format", "markdown") == 0
    assert "different code" not in capsys.readouterr().out
    for i, each in enumerate(found()["runs"]):
        folder = Path(each["folder"])
        write_json(
            folder / "hparams.yaml", {"created": f"2026-01-0{i + 1}", "code_version": f"code{i // 2}", "git_commit": None, "choices": {}}
        )
        metrics = json.loads((folder / "metrics.json").read_text())
        write_json(folder / "metrics.json", metrics | {"data": {"sha256": "0ldolds" if i == 0 else "newnew"}})
    assert run("tiny.yaml", "--format", "markdown") == 1
    (out, err), document = capsys.readouterr(), found()
    assert err.endswith("1 of 4 runs do not count: their data are not those of the newest; fresh=true runs all of them again\n")
    assert [each["status"] for each in document["runs"]] == ["other data", "done", "done", "done"]
    assert "its data are 0ldolds, and newnew in the newest run; fresh=true runs all of them again" in out
    assert "attention and mamba: cannot tell, for of 2 seeds 1 is paired" in out
    assert "the runs are of different code: code0 (1), code1 (2); fresh=true" in out


def test_other_questions_of_the_same_runs_are_another_comparison(player, file):
    assert run("tiny.yaml") == 0
    file.write_text(comparison_file.FILE.replace("at_least: 0.9", "at_least: 0.8"))
    assert run("tiny.yaml") == 0 and len(player.calls) == 4
    assert len(list(Path("runs/comparisons").iterdir())) == 2


def test_what_it_writes_and_prints(player, capsys):
    player.plan = {("transformer", 1): 0.5, ("transformer", 2): 0.6, ("mamba", 2): 0.99}
    assert run("tiny.yaml", "--check", "--format", "markdown") == 1
    out = capsys.readouterr().out
    assert "| mamba | 99 | 2 | 0 | 0.995 [0.931, 1.059] | 0.995 [0.931, 1.059] |" in out
    assert "| attention | 99 | 2 | 0 | 0.550 [-0.085, 1.185] | not applicable |" in out and "without a model: best constant 0.25" in out
    assert "| it learns | mamba: test/exact_match at 2x >= 0.9 | 0.995 [0.931, 1.059] | 2 | held |  | a book |" in out
    document = found()
    assert document["expectations"][1] | {"mean": 0, "low": 0, "high": 0} == {
        "metric": "test/exact_match", "model": "mamba", "over": "attention", "at_least": 0.1, "source": "a book", "length": 16,
        "text": "mamba - attention: test/exact_match >= 0.1", "n": 2, "mean": 0, "low": 0, "high": 0,
        "values": {"mamba": {"1": 1.0, "2": 0.99}, "attention": {"1": 0.5, "2": 0.6}},
        "verdict": "cannot tell", "why": "the interval is on both sides of the bound",
    }  # fmt: skip
    assert document["runs"][0]["command"] == "lab-train --config=tiny.yaml model=transformer model.max_len=16 seed=1"
    assert document["runs"][0]["val"] == {"ce_loss": 0.5, "exact_match": 0.7} and document["runs"][0]["seconds"] >= 0
    assert run("tiny.yaml", "models=mamba", "seeds=1") == 0 and len(player.calls) == 4  # the same runs, another folder
    assert "it is left out" in capsys.readouterr().out and len(list(Path("runs/comparisons").iterdir())) == 2


def test_the_pairs_and_the_curves(player, capsys):
    words = ["tiny.yaml", "seeds=8"]
    player.plan = {("transformer", seed): 0.5 + seed / 100 for seed in range(1, 9)} | {("mamba", 3): "the loss is NaN"}
    player.plan |= {("mamba", seed): 0.9 + seed % 2 / 100 for seed in (1, 2, 4, 5, 6, 7, 8)}
    assert run(*words, "--format", "markdown") == 1
    out, document = capsys.readouterr().out, found()
    (pair,) = document["pairs"]  # at 32 the transformer is not applicable
    assert [pair[name] for name in ("a", "b", "metric", "length", "n")] == ["attention", "mamba", "test/exact_match", 16, 7]
    assert pair["difference"] == pytest.approx(-0.3571, abs=1e-4) and pair["low"] < pair["difference"] < pair["high"] < -0.3
    assert pair["p"] == 0.015625 and pair["p_holm"] is None and pair["effect"] < -10
    assert pair["text"] == "attention and mamba: cannot tell, for of 8 seeds 7 are paired" and pair["text"] in out
    assert "| mamba | 99 | 7 of 8 |" in out and "without mamba: seed 3: failed: the loss is NaN" in out
    lines = {(line["model"], line["metric"], line["x"]): line["points"] for line in document["curves"]}
    assert len(lines) == 12 and lines["mamba", "val/ce_loss", "step"] == [[2, 7, 0.9, 0.9, 0.9], [4, 7, 0.5, 0.5, 0.5]]
    assert [point[0] for point in lines["attention", "val/exact_match", "tokens"]] == [64, 128]
    assert [point[0] for point in lines["attention", "val/exact_match", "seconds"]] == [4.5, 9.0]  # mean of the seeds
    (folder,) = Path("runs/comparisons").iterdir()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    svg = (folder / "curves.svg").read_text()
    assert svg.count('id="axes_') == 6
    assert pair["text"] in (folder / "page.html").read_text()


def test_several_files_are_as_many_comparisons(player, file, capsys):
    file.with_name("other.yaml").write_text(FILE.replace("seeds: 2", "seeds: 1"))
    player.plan = {("mamba", 2): "the loss is NaN"}
    assert run("tiny.yaml", "other.yaml", "models=mamba", "--format", "markdown") == 1
    out, err = capsys.readouterr()
    assert player.calls == ["train mamba 1", "train mamba 2", "train mamba 1"]  # each file has runs of its own
    assert sorted(path.name[:5] for path in Path("runs/comparisons").iterdir()) == ["other", "tiny_"] and out.count("written to") == 2
    assert "1 of 3 runs are not done" in err
    player.plan = {}
    assert run("tiny.yaml", "other.yaml", "models=mamba", "--check") == 1
    assert "expectations did not hold" in capsys.readouterr().err


def test_a_run_that_a_callback_ended_is_done(player, capsys):
    assert run("tiny.yaml") == 0
    for each in found()["runs"]:
        Run(Path(each["folder"])).write_job("done", step=4, reason="a callback ended it before step 9")
    assert run("tiny.yaml") == 0 and "a callback ended it before step 9" in capsys.readouterr().out


def test_a_run_that_is_not_scored_is_not_done(player, capsys):
    player.plan = {("mamba", 2): "no scores"}
    assert run("tiny.yaml") == 1 and "1 of 4 runs are not done" in capsys.readouterr().err
    assert [run["status"] for run in found()["runs"]] == ["done"] * 4
    assert found()["expectations"][0]["why"] == "mamba: seed 2: not scored: trained, but not evaluated: no scores"


def test_show_says_what_is_wrong(capsys):
    assert lab_compare.main(["--show", "nothing"]) == 1
    assert "there is no such file; lab-compare FILE writes it" in capsys.readouterr().err
    Path("comparison.json").write_text("{}")
    assert lab_compare.main(["--show", "."]) == 1 and "is not a comparison of lab: it lacks runs" in capsys.readouterr().err
    older = {"runs": [], "summary": [], "expectations": [], "models": {}, "metrics": [], "method": "", "pairs": [], "curves": []}
    Path("comparison.json").write_text(json.dumps(older))
    assert lab_compare.main(["--show", "."]) == 1 and "is not a comparison of lab: it lacks seq_len" in capsys.readouterr().err
    rest = {"seq_len": 8, "planned": [], "seeds": [], "test": "", "name": "", "command": ""}
    Path("comparison.json").write_text(json.dumps(older | rest))
    assert lab_compare.main(["--show", "."]) == 1 and "is not a comparison of lab: it has no runs" in capsys.readouterr().err


def test_each_process_has_the_threads_that_were_told(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment(0, 2, threads=3)["OMP_NUM_THREADS"] == "3"


def test_two_real_runs(monkeypatch, capsys):
    """The commands of the jobs, in this process."""
    from lab.cli import eval as lab_eval
    from lab.cli import train as lab_train

    class Pool:
        def __init__(self, n_jobs, overview, record, threads=None):
            self.record = record

        def run(self, jobs):
            for job in jobs:
                command = job.next_command()
                while command:
                    main = {"lab.cli.train": lab_train.main, "lab.cli.eval": lab_eval.main}[command[0]]
                    assert main(command[1:]) == 0
                    command = job.next_command(after=command[0])
                self.record(job, None)

    monkeypatch.setattr(multirun, "Pool", Pool)
    bounds = "metric: test/ce_loss, model: lot, at_most: 100, source: a guess", "metric: val/ce_loss, model: lot, at_least: 9, source: x"
    bounds += ("metric: test/mean_sync_order, model: lot, at_least: 0, source: what the model adds",)
    Path("real.yaml").write_text(f"models: [lot]\nseeds: [3, 4]\nexpect: [{', '.join(f'{{{bound}}}' for bound in bounds)}]\n")
    assert run("real.yaml", *TINY) == 0
    document = found()
    assert [each["verdict"] for each in document["expectations"]] == ["held", "not held", "held"]
    assert all(run["seconds"] > 0 and run["status"] == "done" for run in document["runs"])
    steps, tokens, seconds = ([p for p in line["points"]] for line in document["curves"] if line["metric"] == "val/ce_loss")
    assert [point[:2] for point in steps] == [[6, 2], [12, 2]] and [point[0] for point in tokens] == [6 * 8 * 8, 12 * 8 * 8]
    assert 0 < seconds[0][0] < seconds[1][0] < document["runs"][0]["seconds"] and steps[0][3] < steps[0][2] < steps[0][4]
    values = document["expectations"][0]["values"]["lot"]
    assert values["3"] != values["4"]
